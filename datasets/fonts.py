"""Characters drawn by fonts: a character is a class, and each font draws one image of the class.

A drawing is scaled to the box of Omniglot's drawings. In Omniglot's two splits, the longer side of the ink's
box has 17.9 and 17.3 of 28 pixels in the mean, 18 and 17 in the median. The middle of the box lies 0.4 pixels
left of the image's middle and 0.5 pixels above it.
"""

import hashlib
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from math import ceil, floor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datasets.folder import DAMAGE, ranked, readable, some, stamp_of
from datasets.images import OMNIGLOT, SIZE, SPLITS, ImageSet, cached, reason, shrink
from utils.errors import UserError, load_library
from utils.flag import Range, existing

log = logging.getLogger("anml")

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
LONG = 18 / 28  # longer side of a drawing's box, as a part of the image's side
LEFT, UP = 0.4 / 28, 0.5 / 28  # from the image's middle to the box's, as parts of the image's side
EM = 96  # pixels, size of the type; images of more than 48 pixels take twice their side
UNUSED = "\U0010ffff"  # a code for which a font draws its box for missing characters
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
    path: Path
    part: int
    stamp: tuple[int, ...]
    characters: tuple[str, ...]


Drawn = dict[str, dict[int, int]]
"""By character, the number of each font that draws the character and the row of that image."""


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

    A blank drawing does not count, nor does a font's box for missing characters. Of characters that a font
    draws alike, the first has the image. Of fonts that draw a character alike, the first gives the image.

    Returns:
        Both splits. Classes are sorted by code point, images by the path of the font. The images of held-out
        fonts are the last ones of each meta-test class, and each of these classes has all of them.

    Raises:
        UserError: no fonts, too few fonts for two classes in each split, or no such characters.
    """
    wanted = _characters(characters)
    packages = PACKAGES.get(characters, PACKAGES["latin"])
    hint = f"`sudo apt install {packages}` puts fonts into /usr/share/fonts, see docs/data.md"
    faces = _faces(root, wanted, hint)
    pairs = [(number, character) for number, face in enumerate(faces) for character in face.characters]

    def make(positions: Sequence[int]) -> NDArray[np.uint8]:
        chosen = [pairs[position] for position in positions]
        return np.stack([_drawing(faces[number], character, size) for number, character in chosen])

    home = root.resolve()
    name = f"fonts-{hashlib.sha256(os.fsencode(home) + ''.join(wanted).encode()).hexdigest()[:8]}"
    origin = repr([(face.name, face.stamp, face.characters) for face in faces]).encode()
    pixels = cached(cache_dir, name, origin, len(pairs), make, size)
    drawn = _counted(faces, pairs, pixels)
    held = _held_out(faces, drawn, images, held_out_fonts, data_seed)
    classes = sorted(
        c for c, rows in drawn.items() if len(rows) >= images + len(held) and held <= rows.keys()
    )
    used = sorted({number for rows in drawn.values() for number in rows})
    shown = root, len(used), len(faces), len(classes), len(wanted)
    log.info("%s: %d different fonts of %d draw %d of %d characters often enough", *shown)
    tests = len(classes) // 2 if evaluation_classes is None else evaluation_classes
    if min(tests, len(classes) - tests) < 2:
        most = max(map(len, drawn.values()), default=0)
        raise UserError(
            f"{root}: {len(classes)} of {len(wanted)} characters, too few for {tests} meta-test classes and "
            f"others, are drawn by --images {images} and --held_out_fonts {held_out_fonts} of its "
            f"{len(used)} different fonts; no character is drawn by more than {most}; {hint}"
        )
    tested = set(ranked(classes, data_seed)[:tests])
    notes = {
        "fonts": [f"{faces[number].name}, {faces[number].version}" for number in used],
        "fonts_held_out": [faces[number].name for number in sorted(held)],
    }
    sets = {}
    for side in SPLITS:
        last = held if side == "evaluation" else set()
        own = [character for character in classes if (character in tested) == (side == "evaluation")]
        fonts = [number for number in used if number not in held] + sorted(last)
        rows = [[drawn[c][number] for number in fonts if number in drawn[c]] for c in own]
        sets[side] = ImageSet(
            f"fonts {home.name} {characters} {side}",
            torch.from_numpy(pixels[[row for of_class in rows for row in of_class]]),
            tuple(map(len, rows)),
            tuple(f"U+{ord(c):04X} {c}" for c in own),
            OMNIGLOT,
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
        try:
            text = existing(name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            fault = "not UTF-8" if isinstance(error, ValueError) else reason(error)
            known = ", ".join(PACKAGES)
            raise UserError(f"--characters {name}: {fault}; choose {known} or a UTF-8 file") from error
        found = {character for character in text if character.isprintable() and not character.isspace()}
    return sorted(found)


def _faces(root: Path, wanted: Sequence[str], hint: str) -> list[Face]:
    """The fonts below `root` that have a character of `wanted`, sorted by path and by number in the file."""
    library = load_library("fontTools.ttLib")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {hint}")
    found, faults = [], []
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    for name, path in sorted(paths.items()):
        index, number = 0, int(path.suffix.lower() in SUFFIXES)
        try:
            while index < number:
                with path.open("rb") as file:
                    font = library.TTFont(file, fontNumber=index, lazy=True)
                    number = getattr(font.reader, "numFonts", 1)  # of a collection
                    # To spell the names of all glyphs takes several times as long as the rest.
                    font.setGlyphOrder(range(1 << 16))
                    glyphs, version = font.getBestCmap() or {}, font["name"].getDebugName(5)
                ImageFont.FreeTypeFont(str(path), EM, index)
                # Glyph 0 is the box for missing characters.
                has = tuple(character for character in wanted if glyphs.get(ord(character)))
                shown = readable(name) + f"#{index}" * (number > 1)
                found.append(Face(shown, f"{version}", path, index, stamp_of(path), has))
                index += 1
        except Exception as error:  # fontTools raises many kinds on damaged bytes
            faults.append(f"{readable(name)} ({reason(error)})")
    if faults:
        log.warning("%s: %d font files are damaged and left out: %s", root, len(faults), some(faults))
    if not any(face.characters for face in found):
        which = "with one of the characters" if found else f"({', '.join(SUFFIXES)}) that opens"
        raise UserError(f"{root} holds no font {which}; {hint}")
    return [face for face in found if face.characters]


@lru_cache(maxsize=2)
def _opened(path: Path, index: int, size: int) -> tuple[ImageFont.FreeTypeFont, NDArray[np.uint8]]:
    """A font, and the image that it makes of a missing character."""
    # `ImageFont.truetype` would look elsewhere for a file of the same name. Every Pillow has the basic layout
    # engine.
    font = ImageFont.FreeTypeFont(str(path), max(EM, 2 * size), index, layout_engine=ImageFont.Layout.BASIC)
    return font, _image(font, UNUSED, size)


def _drawing(face: Face, character: str, size: int) -> NDArray[np.uint8]:
    """The image of a character, uint8 [1, S, S]: dark on light, or white where the font has no drawing."""
    font, missing = _opened(face.path, face.part, size)
    image = _image(font, character, size)
    return np.full_like(image, 255) if np.array_equal(image, missing) else image


def _image(font: ImageFont.FreeTypeFont, character: str, size: int) -> NDArray[np.uint8]:
    """What a font makes of a character, in Omniglot's box."""
    paper = Image.new("L", (size, size), 255)
    with suppress(*DAMAGE):  # a damaged outline draws nothing
        left, top, right, bottom = font.getbbox(character)
        left, top = floor(left), floor(top)
        ink = Image.new("L", (ceil(right) - left, ceil(bottom) - top))
        ImageDraw.Draw(ink).text((-left, -top), character, 255, font)
        if box := ink.getbbox():
            ink = ink.crop(box)
            side = round(max(ink.size) / LONG)
            paper = Image.new("L", (side, side), 255)
            middle = side * (0.5 - LEFT), side * (0.5 - UP)
            paper.paste(0, (round(middle[0] - ink.width / 2), round(middle[1] - ink.height / 2)), ink)
    return shrink(paper, size)[None]


def _counted(faces: Sequence[Face], pairs: Sequence[tuple[int, str]], pixels: NDArray[np.uint8]) -> Drawn:
    """The rows of `pixels` that count. The log names the fonts that draw nothing of their own."""
    drawn: Drawn = defaultdict(dict)
    first: dict[tuple[str, int], int] = {}  # the first font that makes an image of a character
    copies: dict[str, list[str]] = defaultdict(list)
    for number, group in groupby(range(len(pairs)), lambda row: pairs[row][0]):
        keys = {row: hash(pixels[row].tobytes()) for row in group if pixels[row].min() < 255}
        shared = Counter(keys.values())
        own = {key: row for row, key in reversed(keys.items()) if shared[key] <= SHARED}
        originals: Counter[int] = Counter()
        for key, row in own.items():
            character = pairs[row][1]
            original = first.setdefault((character, key), number)
            originals[original] += 1
            if original == number:
                drawn[character][number] = row
        if number not in originals:
            most = originals.most_common(1)
            copies[f"as {faces[most[0][0]].name}" if most else "nothing"].append(faces[number].name)
    if copies:
        named = "; ".join(f"{', '.join(names)} draw {what}" for what, names in copies.items())
        log.warning("fonts that draw no pixels of their own do not count: %s", named)
    return drawn


def _held_out(faces: Sequence[Face], drawn: Drawn, images: int, count: int, seed: int) -> set[int]:
    """The numbers of `count` fonts out of those that draw nearly all characters."""
    candidates = [rows for rows in drawn.values() if len(rows) >= images + count]
    have = Counter(number for rows in candidates for number in rows)
    fit = {faces[number].name: number for number in have if have[number] >= NEARLY * len(candidates)}
    if len(fit) < count:
        raise UserError(
            f"--held_out_fonts {count}: {len(candidates)} characters are drawn by as many fonts and --images "
            f"{images} others, and {len(fit)} fonts draw nine tenths of these"
        )
    return {fit[name] for name in ranked(fit, seed)[:count]}
