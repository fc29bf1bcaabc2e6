"""Features of whole corpora, and pictures of them."""

from typing import TYPE_CHECKING, Any

from .pages import PageReader, ReadOptions, find_pages

if TYPE_CHECKING:
    from .store import FeatureStore

__all__ = ["FeatureStore", "PageReader", "ReadOptions", "find_pages"]


def __getattr__(name: str) -> Any:
    """Imports the store when it is asked for: it needs the extra 'corpora', which pages and pictures do not."""
    if name == "FeatureStore":
        from .store import FeatureStore

        return FeatureStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
