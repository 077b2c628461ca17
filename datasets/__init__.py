"""Omniglot, and generated characters in its place where it is not needed."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from datasets import glyphs, omniglot
from datasets.cache import cached
from datasets.characters import CLASSES, DRAWINGS, SIZE, CharacterSet, normalise
from utils.errors import UserError

__all__ = ["DATASETS", "SPLITS", "CharacterSet", "load_characters", "load_pool", "normalise"]

DATASETS = ("omniglot", "glyphs")
SPLITS = ("background", "evaluation")

log = logging.getLogger("anml")


def load_characters(
    dataset: str, split: str, root: Path, cache_dir: Path, glyph_seed: int = 0
) -> CharacterSet:
    """Load all drawings of one split, and log their name, counts and manifest hash.

    Args:
        dataset: `omniglot`, the real thing, or `glyphs`, generated and without files.
        split: `background` (964 classes, meta-training) or `evaluation` (659, meta-test).
        root: holds `omniglot-py/` with the split's folder or zip, or is a folder near them (see
            :func:`datasets.omniglot.load`); where both are missing, torchvision downloads the zip. Not
            looked at for `glyphs`.
        cache_dir: gets one file of about 15 MB per split, which makes the next start quick.
        glyph_seed: 0 or greater; other seeds are other glyphs.

    Returns:
        Images uint8 `[C, 20, 28, 28]` and their names, sorted by alphabet, character and file name.

    Raises:
        UserError: data is missing, damaged or incomplete, or an argument is none of the above. No
            other data ever takes its place.
    """
    if dataset not in DATASETS:
        raise UserError(f"no data set {dataset!r}; choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    if dataset == "omniglot":
        characters = omniglot.load(split, Path(root), Path(cache_dir))
    else:
        characters = _load_glyphs(split, glyph_seed, Path(cache_dir))
    log.info(
        "%s: %d characters x %d drawings, manifest %s",
        characters.name,
        *characters.images.shape[:2],
        characters.manifest,
    )
    return characters


def load_pool(
    arguments: argparse.Namespace, split: str, classes: int | None, outputs: int | None, device: torch.device
) -> tuple[torch.Tensor, dict[str, str]]:
    """The first classes of a split as network inputs, and what a run folder says of them.

    Args:
        arguments: those of a script, with its data flags.
        split: see :func:`load_characters`.
        classes: how many; None for as many as the split and the network have.
        outputs: of the network, which class ids must be below; None where they need not.

    Returns:
        Images `[classes, 20, 1, 28, 28]` on `device`, and `data` and `manifest`.

    Raises:
        UserError: as :func:`load_characters`, or the data or the network has too few classes.
    """
    characters = load_characters(
        arguments.dataset, split, arguments.dataset_path, arguments.cache_dir, arguments.glyph_seed
    )
    present = len(characters.characters)
    if classes is None:
        classes = present if outputs is None else min(present, outputs)
    flag = "--train_classes" if split == "background" else "--test_classes"
    if classes > present:
        raise UserError(f"{flag} {classes}: {characters.name} has {present} classes")
    if outputs is not None and classes > outputs:
        raise UserError(f"the network has {outputs} outputs, too few for {flag} {classes}; lower it")
    about = {"data": characters.name, "manifest": characters.manifest}
    return characters.normalised(device)[:classes], about


def _load_glyphs(split: str, seed: int, cache_dir: Path) -> CharacterSet:
    if seed < 0:
        raise UserError(f"the glyph seed {seed} is negative; choose 0 or greater")
    manifest = glyphs.manifest(split, seed)
    shape = (CLASSES[split], DRAWINGS, SIZE, SIZE)
    images = cached(cache_dir, f"glyphs-{split}", manifest, shape, lambda: glyphs.draw(split, seed))
    return CharacterSet(
        f"glyphs {split} (seed {seed})", torch.from_numpy(images), glyphs.names(split), manifest
    )
