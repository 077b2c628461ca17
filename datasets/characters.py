"""What Omniglot's splits hold, and the generated characters in their place."""

from __future__ import annotations

CLASSES = {"background": 964, "evaluation": 659}
"""Characters of each split of Omniglot (Lake et al. 2015)."""

DEFAULT_CLASSES = {"background": 963, "evaluation": 650}
"""Those of them that the paper meta-trains on and that the released code draws meta-tests from."""

DRAWINGS = 20  # of each character, each by another person
CANVAS = 105  # pixels, side of a drawing as published
