"""Where images come from: small named sets that need no network, folders, and the splits the evaluation takes."""

from flowdistill.data.digits import load_digits
from flowdistill.data.named_sets import IMAGE_SETS, load_images
from flowdistill.data.shapes import load_shapes
from flowdistill.data.splits import balanced_split, split_halves

__all__ = ["IMAGE_SETS", "balanced_split", "load_digits", "load_images", "load_shapes", "split_halves"]
