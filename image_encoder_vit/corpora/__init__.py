"""Features of whole corpora, and pictures of them."""
