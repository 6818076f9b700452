"""What attention keeps of one image: its gates block by block, as numbers and as a picture."""

from spem.explain.picture import draw
from spem.explain.reading import BlockView, Explanation, explain

__all__ = ["BlockView", "Explanation", "draw", "explain"]
