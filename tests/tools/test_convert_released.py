"""Models of others: read without running them, converted where they fit, named where they do not."""

import io
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datasets.images import Normalisation
from model.modelfactory import Network, build, load_network, restore
from tests.conftest import Call
from tools import convert_released
from tools.convert_released import LEGACY_MAGIC, convert, read
from utils.errors import UserError
from utils.files import Checkpoint, load_checkpoint

ROOT = Path(__file__).parents[2]
WIDTHS = {
    "ANML": {"nm_channels": 2, "pln_channels": 3, "num_classes": 5},
    "OML": {"pln_channels": 3, "num_classes": 5},
}


class Learner(nn.Module):
    """As much of the released class as its file shows: a list of parameters, one of statistics."""

    def __init__(self, parameters: list[Tensor], extra: object = None) -> None:
        super().__init__()
        self.config = [("conv1_nm", [112, 3, 3, 3, 1, 0]), ("linear", [1024, 2304])]
        self.extra = extra
        self.vars = nn.ParameterList([nn.Parameter(value.clone()) for value in parameters])
        self.vars_bn = nn.ParameterList([nn.Parameter(torch.zeros(3), requires_grad=False)])


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@contextmanager
def released_module() -> Iterator[None]:
    """While this is open, `Learner` lives where the released code has it; afterwards nowhere."""
    module = ModuleType("model.learner")
    module.Learner = Learner  # type: ignore[attr-defined]
    sys.modules["model.learner"], Learner.__module__ = module, "model.learner"
    try:
        yield
    finally:
        del sys.modules["model.learner"]
        Learner.__module__ = __name__


def network(kind: str = "ANML") -> Network:
    net = build(kind, WIDTHS[kind], torch.Generator().manual_seed(3))
    with torch.no_grad():  # no two parameters alike, biases and scales too
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return net


def save_released(path: Path, net: Network, zipped: bool = True, extra: object = None) -> None:
    with released_module(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the format before torch 1.6 wants the source beside it
        torch.save(Learner(list(net.parameters()), extra), path, _use_new_zipfile_serialization=zipped)


def higher_names(style: str) -> list[str]:
    """Names in the order of this project's parameters."""
    names = []
    for net in ("nm", "rln"):
        for block in range(3):
            for number, layer in enumerate(("conv", "norm" if style != "bn" else "bn")):
                place = f"encoder.{block}.{number}" if style == "encoder" else f"convBlock{block + 1}.{layer}"
                names += [f"{net}.{place}.weight", f"{net}.{place}.bias"]
        if net == "nm":
            names += ["nm.fc.weight", "nm.fc.bias"]
    return [*names, "fc.weight", "fc.bias"]


def higher_state(net: Network, style: str = "norm") -> dict[str, Tensor]:
    """A higherANML state dict of the same function for grey images, in its own order."""
    values = [
        value.detach().sum(1, keepdim=True) if name.endswith("block1.conv.weight") else value.detach()
        for name, value in net.named_parameters()
    ]  # fmt: skip
    return dict(reversed(list(zip(higher_names(style), values, strict=True))))


def gemcl(channels: int, outputs: int = 2, blocks: int = 4) -> nn.Sequential:
    """GeMCL's blocks in float64, no two numbers alike. All are sums of a few powers of 2, kernels times 3, so
    that float32 and a division by 3 change none."""
    net = nn.Sequential()
    for k in range(blocks):
        conv = nn.Conv2d(outputs if k else channels, outputs, 3, padding=1)
        net.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)))
    generator = torch.Generator().manual_seed(6)
    for value in net.state_dict().values():
        drawn = torch.randint(1, 200, value.shape, generator=generator)
        value.copy_(drawn if value.ndim == 0 else (drawn - 90 * (value.ndim > 1)) * 3 / 64)
    return nn.Sequential(OrderedDict(layers=net)).double().eval()


@pytest.mark.parametrize(
    ("channels", "flags", "size", "pixels"),
    [
        (1, (), 84, ((0,), (255,))),
        (1, ("--size", "28"), 28, ((0,), (255,))),
        (3, (), 84, ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))),
        (
            3,
            ("--pixels", "cifar", "--size", "32"),
            32,
            ((125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)),
        ),
    ],
)
def test_gemcl(
    channels: int, flags: tuple[str, ...], size: int, pixels: Any, call: Call, tmp_path: Path
) -> None:
    """Features are the same, though a bias is now part of a running mean, and grey kernels have colours."""
    foreign, path = gemcl(channels), tmp_path / "out.net"
    torch.save({name: value.float() for name, value in foreign.state_dict().items()}, tmp_path / "in.net")
    done = call(convert_released, str(tmp_path / "in.net"), str(path), *flags)
    assert (done.returncode, "not needed" in done.stdout) == (0, False), done.stderr
    net = load_network(path).double()
    assert (net.network, net.image_size, net.normalisation) == ("Conv4", size, Normalisation(*pixels))
    shape = (2, channels, size, size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    inputs = net.normalisation.on("cpu", torch.float64)(images)
    expected = foreign(inputs).flatten(1)
    assert expected.std() > 1
    torch.testing.assert_close(net.features(inputs), expected, rtol=1e-12, atol=0)


def test_what_is_nearly_gemcl(tmp_path: Path) -> None:
    torch.save(gemcl(1, blocks=5).state_dict(), tmp_path / "in.net")
    with pytest.raises(UserError, match="holds 35 tensors and is neither"):
        convert(tmp_path / "in.net")
    state = gemcl(1).state_dict()
    torch.save(state | {"layers.1.0.bias": torch.ones(3)}, tmp_path / "in.net")
    message = r"layers\.1\.0\.bias is \[3\] where Conv4 has body\.block2\.conv\.bias \[2\]$"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "in.net")
    torch.save(state, tmp_path / "in.net")
    with pytest.raises(UserError, match="--size 8 is too small"):
        convert(tmp_path / "in.net", 8)
    save_released(tmp_path / "in.net", network())
    with pytest.raises(UserError, match="ANML has 36 tensors at --size 84, not 28"):
        convert(tmp_path / "in.net", 84)


def logits(net: Network) -> Tensor:
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    output: Tensor = net(images.expand(-1, 3, -1, -1))
    return output.detach()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["ANML", "OML"])
def test_a_released_module(kind: str, zipped: bool, tmp_path: Path) -> None:
    net = network(kind)
    save_released(tmp_path / "in.net", net, zipped)
    found, weights, rest = convert(tmp_path / "in.net")
    assert type(found) is type(net)
    assert net.widths.items() <= found.widths.items()  # and OML's hidden layer, in numbers
    torch.testing.assert_close(weights, dict(net.state_dict()), rtol=0, atol=0)
    assert rest == ["vars_bn.0"]


def test_the_command_writes_a_model_that_loads(call: Call, tmp_path: Path) -> None:
    """A file that is there is kept, here the foreign model itself."""
    net, path = network(), tmp_path / "m.net"
    save_released(path, net)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"python -m tools\.convert_released IN\.net NEW\.net"):
        load_checkpoint(path)
    done = call(convert_released, str(path), str(path))
    assert done.returncode == 0, done.stderr
    assert "not needed: 1 other tensors, vars_bn.0" in done.stdout
    assert f"is kept as {tmp_path / 'm.1.net'}" in done.stdout
    assert (tmp_path / "m.1.net").read_bytes() == before
    saved = load_checkpoint(path)
    copy = restore(saved, "m.net")
    assert torch.equal(logits(copy), logits(net))


@pytest.mark.parametrize("style", ["norm", "bn", "encoder"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_higher_anml_state_dict(style: str, wrapped: bool, tmp_path: Path) -> None:
    net = network()
    state = higher_state(net, style)
    torch.save(
        {"source": "import os", "state": state, "kwargs": {}} if wrapped else state, tmp_path / "in.net"
    )
    found, weights, rest = convert(tmp_path / "in.net")
    assert rest == []
    torch.testing.assert_close(
        weights["pln.block2.conv.weight"], dict(net.state_dict())["pln.block2.conv.weight"]
    )
    kernel = weights["nm.block1.conv.weight"]
    assert torch.equal(kernel[:, 0], kernel[:, 2])
    copy = restore(Checkpoint("ANML", found.widths, weights, {}, 0), "in.net")
    torch.testing.assert_close(logits(copy), logits(net))
    with pytest.raises(UserError, match=r"tools\.convert_released"):
        load_checkpoint(tmp_path / "in.net")


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = higher_state(network())
    state["rln.convBlock2.norm.weight"] = torch.ones(4)
    torch.save(state, tmp_path / "in.net")
    message = r"rln\.convBlock2\.norm\.weight is \[4\] where ANML has pln\.block2\.norm\.weight \[3\]$"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "in.net")
    state["rln.convBlock2.norm.weight"] = torch.ones(0)
    torch.save(state, tmp_path / "in.net")
    with pytest.raises(UserError, match=r"norm\.weight is empty"):
        convert(tmp_path / "in.net")
    del state["fc.bias"]
    torch.save(state, tmp_path / "in.net")
    with pytest.raises(UserError, match="holds 27 tensors and is neither"):
        convert(tmp_path / "in.net")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(zipped: bool, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "in.net"
    net = network()
    save_released(path, net, zipped, Trap(sprung))
    with pytest.raises(UserError, match="convert_released"):
        load_checkpoint(path)
    _, weights, _ = convert(path)
    assert torch.equal(weights["head.bias"], net.get_parameter("head.bias"))
    torch.save(Trap(sprung), path, _use_new_zipfile_serialization=zipped)
    for data in (path.read_bytes(), pickle.dumps(Trap(sprung)), pickle.dumps(Trap(sprung), protocol=0)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"holds pickled Python objects|in\.net: the file is damaged"):
            load_checkpoint(path)
        with pytest.raises(UserError, match=r"in\.net"):
            convert(path)
    assert not sprung.exists()


def test_modules_views_and_types(tmp_path: Path) -> None:
    module, base = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.arange(12.0)
    state = {"t": base.reshape(3, 4).t(), "part": base[3:5], "half": base.half(), "n": torch.tensor(3)}
    for saved, expected in (module, dict(module.state_dict())), (state, state):
        for zipped in (True, False):
            torch.save(saved, tmp_path / "m.net", _use_new_zipfile_serialization=zipped)
            found = {name: value.detach() for name, value in read(tmp_path / "m.net").items()}
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def zipped(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file.getvalue()


def hostile() -> dict[str, bytes]:
    """Pickles that would exhaust a careless reader."""
    deep = b")" + b"\x85" * 100_000
    head = b"".join(pickle.dumps(x, protocol=2) for x in (LEGACY_MAGIC, 1001, {"little_endian": True}))
    # A dict with the same dict under two names, and so on: 2 to the power of 60 ways to its end.
    shared = b"}" + b"".join(b"q%c}(X\1\0\0\0ah%cX\1\0\0\0bh%cu" % (k, k, k) for k in range(60))
    wide = b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(60))  # a pair of the same pair, and so on
    return {
        "a wide key": b"\x80\x02}" + wide + b"K\x01s.",
        "a deep key": b"\x80\x02}" + deep + b"K\x01s.",
        "a deep key of a storage": head + b"\x80\x02}.\x80\x02]" + deep + b"a.",
        "a wide key of a storage": head + b"\x80\x02}.\x80\x02]" + wide + b"a.",
        "a dict many times over": head + b"\x80\x02" + shared + b".\x80\x02].",
        "a huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "a huge text": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "a huge byte array": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        "another protocol": pickle.dumps({"a": 1}, protocol=5),
        "a call of a value": b"\x80\x02K\x01)R.",
        "a deep key in a zip": zipped(b"\x80\x02}" + deep + b"K\x01s."),
        "no end": b"\x80\x02" + b"(" * 1000,
        "nothing": b"",
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_pickles(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.net").write_bytes(hostile()[name])
    with pytest.raises(UserError, match=r"m\.net"):
        convert(tmp_path / "m.net")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_short_or_too_large(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.net"
    save_released(path, network(), zipped)
    for limit in ("FILE", "PICKLES"):
        with monkeypatch.context() as patch:
            patch.setattr(convert_released, limit, 100)
            with pytest.raises(UserError, match=r"in\.net"):
                convert(path)
    data = path.read_bytes()
    for kept in range(0, len(data) - 1, len(data) // 30):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=r"in\.net"):
            convert(path)
    with pytest.raises(UserError, match=r"absent\.net"):
        convert(tmp_path / "absent.net")
