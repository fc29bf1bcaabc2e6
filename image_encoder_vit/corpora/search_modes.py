"""The ways to compare pages in a search, which need no extra to be named."""

POOLED, CELL, LATE, RERANKED = "pooled", "cell", "late", "reranked"
MODES = (RERANKED, POOLED, CELL, LATE)
SHORTLIST_PAGES = 50

Box = tuple[float, float, float, float]  # top, left, bottom, right in px of the original image
