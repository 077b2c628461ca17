"""Networks of one's own, as somebody would write them who has read `docs/extending.md`: none is ANML."""

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from model.modelfactory import Network


class GroupNorm(Network):
    """(a) Convolutions with group norm, and a sigmoid gate on the features."""

    def __init__(self, width: int = 8, groups: int = 2, num_classes: int = 20) -> None:
        super().__init__()

        def trunk() -> nn.Sequential:
            return nn.Sequential(
                *(nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width), nn.ReLU(), nn.MaxPool2d(4)),
                *(nn.Conv2d(width, width, 3), nn.GroupNorm(groups, width), nn.ReLU(), nn.Flatten()),
            )

        self.trunk, self.gating = trunk(), trunk()
        self.head = nn.Linear(16 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images) * self.gate(images))
        return logits

    def gate(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.gating(images))


class TwoViews(Network):
    """(b) An image and its mirror image through one trunk: each kernel is used twice."""

    def __init__(self, width: int = 6, num_classes: int = 20) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, width, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        )
        self.head = nn.Linear(2 * 4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        views = [self.trunk(images), self.trunk(images.flip(3))]
        logits: Tensor = self.head(torch.cat(views, 1))
        return logits


class Skipped(Network):
    """(c) A kernel that a switch skips."""

    no_effect = ("skipped.weight", "skipped.bias")

    def __init__(self, width: int = 6, skip: bool = True, num_classes: int = 20) -> None:
        super().__init__()
        self.skip = skip
        self.first = nn.Conv2d(3, width, 5, stride=3)
        self.skipped = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(64 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.first(images))
        x = x if self.skip else F.relu(self.skipped(x))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Tied(Network):
    """(d) One module in two places, and one parameter in two modules."""

    def __init__(self, width: int = 6, num_classes: int = 20) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2)
        again = nn.Conv2d(width, width, 3, stride=2)
        self.body = nn.Sequential(again, nn.ReLU(), nn.ZeroPad2d(2), again, nn.ReLU())
        self.last = nn.Conv2d(width, width, 3, stride=2)
        self.last.weight = again.weight
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.last(self.body(self.first(images))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class CosineHead(nn.Module):
    """Cosines of features and a weight for each class, over a temperature that all share."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features))
        self.temperature = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x) @ F.normalize(self.weight).t() / self.temperature


class Cosine(Network):
    """(e) A cosine head with a temperature."""

    def __init__(self, width: int = 6, num_classes: int = 20) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, stride=3), nn.Tanh(), nn.Flatten())
        self.head = CosineHead(81 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images))
        return logits


class BatchNorm(Network):
    """(f) Batch norm and dropout: buffers, and another thing in training than afterwards."""

    def __init__(self, width: int = 6, dropout: float = 0.3, num_classes: int = 20) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Conv2d(width, width, 3, stride=2), nn.Flatten()),
        )
        self.head = nn.Linear(36 * width, num_classes)
        self.register_buffer("a_mask", torch.ones(3, dtype=torch.bool))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images))
        return logits


class OddLayers(Network):
    """(g) Layers with one parameter, with parameters of their own shapes, and initial values of their own."""

    rln_training = 1
    rln_meta_test = 3

    def __init__(
        self, width: int = 6, slope: float = 0.25, bias: bool = False, num_classes: int = 20
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=3, bias=bias)
        self.prelu = nn.PReLU(init=slope)
        self.norm = nn.LayerNorm([width, 9, 9])
        nn.init.constant_(self.norm.weight, 0.5)
        self.head = nn.Linear(81 * width, num_classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.prelu(self.conv(images))).flatten(1))
        return logits


class FiLM(Network):
    """(h) Feature-wise linear modulation: an inner gate with a shift, from a network of its own."""

    def __init__(self, width: int = 6, num_classes: int = 20) -> None:
        super().__init__()
        out = nn.Linear(324, 2 * width)
        nn.init.zeros_(out.weight)
        self.film = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.ReLU(), nn.Flatten(), out)
        self.first = nn.Conv2d(3, width, 3, stride=2)
        self.second = nn.Conv2d(width, width, 3, stride=2)
        self.head = nn.Linear(36 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        scale, shift = self.film(images)[:, :, None, None].chunk(2, 1)
        x = F.relu((1 + scale) * self.first(images) + shift)
        logits: Tensor = self.head(F.relu(self.second(x)).flatten(1))
        return logits

    def gate(self, images: Tensor) -> Tensor:
        scale: Tensor = 1 + self.film(images).chunk(2, 1)[0]
        return scale


OWN: dict[str, type[Network]] = {
    kind.__name__: kind for kind in (GroupNorm, TwoViews, Skipped, Tied, Cosine, BatchNorm, OddLayers, FiLM)
}
