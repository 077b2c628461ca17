"""Characters drawn by fonts: a character is a class, and each font draws one image of the class.

A drawing is scaled to the box of Omniglot's drawings. In Omniglot's two splits, the longer side of the ink's
box has 17.9 and 17.3 of 28 pixels in the mean, 18 and 17 in the median. The middle of the box lies 0.4 pixels
left of the image's middle and 0.5 pixels above it.
"""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from math import ceil, floor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datasets.folder import DAMAGE, ranked, readable, some, stamp_of
from datasets.images import OMNIGLOT, SIZE, SPLITS, ImageSet, cached, shrink
from utils.errors import UserError, load_library, reason
from utils.files import read_text
from utils.flag import Range, existing

log = logging.getLogger("anml")

SUFFIXES = {".ttf": "TTFont", ".otf": "TTFont", ".ttc": "TTCollection", ".otc": "TTCollection"}
LONG = 18 / 28  # longer side of a drawing's box, as a part of the image's side
LEFT, UP = 0.4 / 28, 0.5 / 28  # from the image's middle to the box's, as parts of the image's side
EM = 96  # pixels, size of the type; images of more than 48 pixels take twice their side
SHARED = 3  # Latin, Greek and Cyrillic A share a drawing; a drawing that more share is a placeholder
NEARLY = 0.9  # part of the characters that a font to be held out has to draw
ALIKE = set(
    "cklopsuvwxzıĸµø"  # noqa: RUF001
    "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧικνοπρυχφψ"
    "АВЕЅІЈКМНОРСТУХГПФЄавгджзийклмнопрстухфцчшщъыьэюяеѕіј"
)
"""Letters that, scaled to one box, look like their capital or like a letter of another of the scripts."""

PACKAGES = {
    "hangul": "fonts-alee fonts-baekmuk fonts-nanum fonts-nanum-extra fonts-naver-d2coding "
    "fonts-unfonts-core fonts-unfonts-extra fonts-woowa-bm",
    "kanji": "fonts-aoyagi-kouzan-t fonts-aoyagi-soseki fonts-dejima-mincho fonts-ipaexfont fonts-kiloji "
    "fonts-komatuna fonts-kouzan-mouhitsu fonts-migmix fonts-motoya-l-cedar fonts-motoya-l-maruberi "
    "fonts-oradano-mincho-gsrr fonts-reggae fonts-sawarabi-gothic fonts-sawarabi-mincho fonts-seto "
    "fonts-umeplus fonts-vlgothic",
    "latin": "fonts-dejavu fonts-freefont-ttf fonts-liberation",
}
"""Packages of Debian and Ubuntu with fonts, by what `--characters` names."""


class Face(NamedTuple):
    """A font of a file, with those of the characters asked for that its table of characters has."""

    name: str
    version: str
    font: ImageFont.FreeTypeFont
    stamp: tuple[int, ...]
    characters: tuple[str, ...]


def load(
    split: str,
    root: Path,
    cache_dir: Path,
    size: int = SIZE,
    *,
    characters: Annotated[
        str,
        "classes: hangul (2,350 syllables of KS X 1001), kanji (2,965 of JIS level 1), latin (with Greek and "
        "Cyrillic letters), or a UTF-8 file of characters",
    ] = "hangul",
    images: Annotated[int, "fonts that draw a class at least, without those held out", Range(1)] = 20,
    evaluation_classes: Annotated[
        int | None, "classes kept for meta-test, drawn by --data_seed; else half of them", Range(2)
    ] = None,
    held_out_fonts: Annotated[
        int, "fonts, drawn by --data_seed, that make the test images and no others", Range(0)
    ] = 0,
    data_seed: Annotated[int, "seed of these draws", Range(0, 2**32 - 1)] = 0,
) -> dict[str, ImageSet]:
    """Characters drawn by the fonts (TrueType, OpenType, collections) below a folder.

    A blank drawing does not count, nor does a font's box for missing characters, nor a drawing that more than
    `SHARED` characters share. Of characters that a font draws alike, the first has the image. Of fonts that
    draw a character alike, the first gives the image.

    Returns:
        Both splits. Classes are sorted by code point, images by the path of the font. The images of held-out
        fonts are the last ones of each meta-test class, and each of these classes has all of them.

    Raises:
        UserError: no fonts, too few fonts for two classes in each split, or no such characters.
    """
    wanted = _characters(characters)
    packages = PACKAGES.get(characters, PACKAGES["latin"])
    hint = f"`sudo apt install {packages}` puts fonts into /usr/share/fonts, see docs/data.md"
    faces = _faces(root, wanted, size, hint)
    name = os.fsencode(root.resolve()) + "".join(wanted).encode()
    pixels = _pixels(faces, cache_dir, f"fonts-{hashlib.sha256(name).hexdigest()[:8]}", size)
    drawn = _drawn(faces, wanted, pixels)
    has = drawn >= 0
    enough = has.sum(0) >= images + held_out_fonts
    nearly = np.flatnonzero(has[:, enough].sum(1) >= NEARLY * enough.sum())
    fit = {faces[number].name: number for number in nearly.tolist()}
    held = np.array(sorted(fit[name] for name in ranked(fit, data_seed)[:held_out_fonts]), np.int64)
    used = np.flatnonzero(has.any(1)).tolist()
    classes = np.flatnonzero(enough & has[held].all(0) & (len(held) == held_out_fonts)).tolist()
    shown = root, len(used), len(faces), len(classes), len(wanted)
    log.info("%s: %d different fonts of %d draw %d of %d characters often enough", *shown)
    tests = len(classes) // 2 if evaluation_classes is None else evaluation_classes
    if min(tests, len(classes) - tests) < 2:
        raise UserError(
            f"{root}: {len(classes)} of {len(wanted)} characters, too few for {tests} meta-test classes and "
            f"others, are drawn by --images {images} and --held_out_fonts {held_out_fonts} of its "
            f"{len(used)} different fonts; no character is drawn by more than {has.sum(0).max()}; {hint}"
        )
    tested = set(ranked((wanted[label] for label in classes), data_seed)[:tests])
    notes = {
        "fonts": [f"{faces[number].name}, {faces[number].version}" for number in used],
        "fonts_held_out": [faces[number].name for number in held],
    }
    sets = {}
    for side in SPLITS:
        last = held if side == "evaluation" else held[:0]
        table = drawn[[*np.setdiff1d(used, held), *last]]
        rows = {k: table[:, k] for k in classes if (wanted[k] in tested) == (side == "evaluation")}
        sets[side] = ImageSet.of(
            f"fonts {root.resolve().name} {characters} {side}",
            {f"U+{ord(wanted[k]):04X} {wanted[k]}": pixels[own[own >= 0]] for k, own in rows.items()},
            normalisation=OMNIGLOT,
            notes=notes,
            test_only=len(last),
        )
    return sets


def _characters(name: str) -> list[str]:
    """The characters that `--characters` names, sorted by code point."""
    if name in ("hangul", "kanji"):
        # Rows 16 to 40 of KS X 1001, and rows 16 to 47 of JIS X 0208, whose last row is not full.
        codec, end = ("euc_kr", 41) if name == "hangul" else ("euc_jp", 48)
        codes = (bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, end) for cell in range(1, 95))
        found = {code.decode(codec, "ignore") for code in codes} - {""}
    elif name == "latin":
        blocks = (*range(0x41, 0x180), *range(0x386, 0x3CF), *range(0x400, 0x460))
        letters = {letter for letter in map(chr, blocks) if unicodedata.category(letter) in ("Lu", "Ll")}
        found = {letter for letter in letters if unicodedata.normalize("NFD", letter)[0] not in ALIKE}
    else:
        text = read_text(
            existing(name), f"--characters {name}", f"; choose {', '.join(PACKAGES)} or a UTF-8 file"
        )
        found = {character for character in text if character.isprintable() and not character.isspace()}
    return sorted(found)


def _faces(root: Path, wanted: Sequence[str], size: int, hint: str) -> list[Face]:
    """The fonts below `root` that have a character of `wanted`, sorted by path and by number in the file."""
    library = load_library("fontTools.ttLib")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {hint}")
    found, faults = [], []
    files = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        try:
            with path.open("rb") as file:
                opened = getattr(library, SUFFIXES[path.suffix.lower()])(file, lazy=True)
                fonts = getattr(opened, "fonts", [opened])  # of a collection
                for index, font in enumerate(fonts):
                    # To spell the names of all glyphs takes several times as long as the rest.
                    font.setGlyphOrder(range(1 << 16))
                    glyphs, version = font.getBestCmap() or {}, font["name"].getDebugName(5)
                    # `ImageFont.truetype` would look elsewhere for a file of the same name. Every Pillow has
                    # the basic layout engine.
                    em, layout = max(EM, 2 * size), ImageFont.Layout.BASIC
                    drawer = ImageFont.FreeTypeFont(str(path), em, index, layout_engine=layout)
                    # Glyph 0 is the box for missing characters.
                    if has := tuple(character for character in wanted if glyphs.get(ord(character))):
                        shown = readable(name) + f"#{index}" * (len(fonts) > 1)
                        found.append(Face(shown, f"{version}", drawer, stamp_of(path), has))
        except Exception as error:  # fontTools raises many kinds on damaged bytes
            faults.append(f"{readable(name)} ({reason(error)})")
    if faults:
        log.warning("%s: %d font files are damaged and left out: %s", root, len(faults), some(faults))
    if not found:
        raise UserError(f"{root} holds no font that opens with one of the characters; {hint}")
    return found


def _drawing(face: Face, character: str, size: int) -> NDArray[np.uint8]:
    """The image of a character in Omniglot's box, uint8 [1, S, S]: dark on light."""
    paper = Image.new("L", (size, size), 255)
    with suppress(*DAMAGE):  # a damaged outline draws nothing
        left, top, right, bottom = face.font.getbbox(character)
        left, top = floor(left), floor(top)
        ink = Image.new("L", (ceil(right) - left, ceil(bottom) - top))
        ImageDraw.Draw(ink).text((-left, -top), character, 255, face.font)
        if box := ink.getbbox():
            ink = ink.crop(box)
            side = round(max(ink.size) / LONG)
            paper = Image.new("L", (side, side), 255)
            middle = side * (0.5 - LEFT), side * (0.5 - UP)
            paper.paste(0, (round(middle[0] - ink.width / 2), round(middle[1] - ink.height / 2)), ink)
    return shrink(paper, size)[None]


def _pixels(faces: Sequence[Face], cache_dir: Path, name: str, size: int) -> NDArray[np.uint8]:
    """The images [N, 1, S, S] of the characters of each font, made or from the cache `name`."""
    pairs = [(face, character) for face in faces for character in face.characters]

    def make(positions: Sequence[int]) -> NDArray[np.uint8]:
        return np.stack([_drawing(*pairs[position], size) for position in positions])

    origin = repr([(face.name, face.stamp, face.characters) for face in faces]).encode()
    return cached(cache_dir, name, origin, len(pairs), make, size)


def _drawn(faces: Sequence[Face], wanted: Sequence[str], pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[fonts, characters] the row of `pixels`, or -1 where none counts. The log names the fonts that draw
    nothing of their own."""
    fonts = np.repeat(np.arange(len(faces)), [len(face.characters) for face in faces])
    characters = np.searchsorted(wanted, [character for face in faces for character in face.characters])
    rows = np.flatnonzero(pixels.min((1, 2, 3)) < 255)
    keys = np.unique([hash(pixels[row].tobytes()) for row in rows], return_inverse=True)[1]
    alike = fonts[rows] * len(rows) + keys
    _, first, shared = np.unique(alike, return_index=True, return_counts=True)
    kept = np.sort(first[shared <= SHARED])
    copies = characters[rows[kept]] * len(rows) + keys[kept]
    rows = rows[kept[np.unique(copies, return_index=True)[1]]]
    drawn = np.full((len(faces), len(wanted)), -1)
    drawn[fonts[rows], characters[rows]] = rows
    if names := [face.name for face, own in zip(faces, drawn, strict=True) if own.max() < 0]:
        log.warning("fonts that draw no pixels of their own do not count: %s", ", ".join(names))
    return drawn
