"""Lists of prompts that are the captions of pictures."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from flowdistill.conditioning.prompt_lists import Numbers, PromptList, Texts, read_prompts
from flowdistill.data.sources import open_pictures
from flowdistill.utils.errors import UserError
from flowdistill.utils.shipped import find_path


def has_captions(path: str | os.PathLike[str]) -> bool:
    """Whether a path names pictures, whose captions are meant, and no file of prompts."""
    return os.fspath(path).endswith(".tar") or find_path(path).is_dir()


def read_prompts_or_captions(path: str | os.PathLike[str], column: str | None = None) -> PromptList:
    """The prompts of a file (:func:`flowdistill.conditioning.prompt_lists.read_prompts`), or the captions of a folder,
    of tars or of a folder that datasets has saved: each different one once, drawn as often as it is there.

    Raises:
        UserError: as for both, or pictures without captions.
    """
    if not has_captions(path):
        return read_prompts(path, column)
    found = open_pictures(path).captions(column)
    counts = Counter(caption for captions in found or () for caption in captions)
    if not counts:
        raise UserError(f"teacher.prompts is {path}, whose pictures have no captions; a folder has them in "
                        "metadata.jsonl, metadata.csv or metadata.parquet, or in 1.txt for 1.png")
    weights = np.array(list(counts.values()), dtype=np.float64)
    return PromptList(Texts(counts), Numbers(weights / weights.sum()))
