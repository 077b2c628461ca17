"""Models of others: read without running them, converted where they fit, named where they do not."""

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datasets.images import Normalisation
from model.modelfactory import Network, load_network
from tests.conftest import Call
from tests.model.test_method import network
from tools import convert_released
from tools.convert_released import LEGACY_MAGIC, convert, read
from utils.errors import UserError
from utils.files import load_checkpoint


class Learner(nn.Module):
    """As much of the released class as its file shows: a list of parameters, one of statistics.

    A file names the class by its module, which is this one and another in the released code. The name is
    never looked up.
    """

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


def small(kind: str = "ANML") -> Network:
    return network(kind)[0].float()


def released(net: Network, extra: object = None) -> object:
    """What the released code saves."""
    return Learner(list(net.parameters()), extra)


def save(path: Path, content: object, zipped: bool = True) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the format before torch 1.6 wants the source beside it
        torch.save(content, path, _use_new_zipfile_serialization=zipped)


def higher_state(net: Network, style: str = "norm") -> dict[str, Tensor]:
    """A higherANML state dict of the same function for grey images, in its own order."""
    state = {}
    for name, value in reversed(list(net.named_parameters())):
        name = name.replace("pln.", "rln.").replace("nm.gate", "nm.fc").replace("head", "fc")
        if style == "encoder":
            name = re.sub(r"block(\d)", lambda found: f"encoder.{int(found[1]) - 1}", name)
            name = name.replace(".conv.", ".0.").replace(".norm.", ".1.")
        name = name.replace("block", "convBlock").replace(".norm.", f".{style}.")
        first = name.endswith(("Block1.conv.weight", "encoder.0.0.weight"))
        state[name] = value.detach().sum(1, keepdim=True) if first else value.detach()
    return state


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
        (1, "", 84, ((0,), (255,))),
        (1, "--size=28", 28, ((0,), (255,))),
        (3, "", 84, ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))),
        (3, "--pixels=cifar --size=32", 32, ((125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255))),
    ],
)
def test_gemcl(channels: int, flags: str, size: int, pixels: Any, call: Call, tmp_path: Path) -> None:
    """Features are the same, though a bias is now part of a running mean, and grey kernels have colours."""
    foreign, path = gemcl(channels), tmp_path / "out.net"
    torch.save({name: value.float() for name, value in foreign.state_dict().items()}, tmp_path / "in.net")
    done = call(convert_released, str(tmp_path / "in.net"), str(path), *flags.split())
    assert (done.returncode, "not needed" in done.stdout) == (0, False), done.stderr
    net = load_network(path).double()
    assert (net.network, net.image_size, net.normalisation) == ("Conv4", size, Normalisation(*pixels))
    shape = (2, channels, size, size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    inputs = net.normalisation.on("cpu", torch.float64)(images)
    expected = foreign(inputs).flatten(1)
    assert expected.std() > 1
    torch.testing.assert_close(net.features(inputs), expected, rtol=1e-12, atol=0)


FORMS: dict[str, Callable[[Network], object]] = {
    "released": released,
    **{f"higherANML, {style}": partial(higher_state, style=style) for style in ("norm", "bn", "encoder")},
    "higherANML, wrapped": lambda net: {"source": "import os", "state": higher_state(net), "kwargs": {}},
}


@pytest.mark.parametrize(
    ("form", "kind", "zipped"),
    [
        *(("released", kind, zipped) for kind in ("ANML", "OML") for zipped in (True, False)),
        *((form, "ANML", True) for form in FORMS if form != "released"),
    ],
)
def test_the_command_writes_the_same_function(
    form: str, kind: str, zipped: bool, call: Call, tmp_path: Path
) -> None:
    """A file that is there is kept, here the foreign model itself."""
    net, path = small(kind), tmp_path / "m.net"
    save(path, FORMS[form](net), zipped)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"python -m tools\.convert_released"):
        load_checkpoint(path)
    done = call(convert_released, str(path), str(path))
    assert done.returncode == 0, done.stderr
    assert ("not needed: 1 other tensors, vars_bn.0" in done.stdout) == (form == "released")
    assert f"is kept as {tmp_path / 'm.1.net'}" in done.stdout
    assert (tmp_path / "m.1.net").read_bytes() == before
    copy = load_network(path)
    assert net.widths.items() <= copy.widths.items()  # and OML's hidden layer, in numbers
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(5)).expand(-1, 3, -1, -1)
    torch.testing.assert_close(copy(images), net(images))
    if form == "released":
        torch.testing.assert_close(dict(copy.state_dict()), dict(net.state_dict()), rtol=0, atol=0)
    else:  # of grey images
        kernel = copy.get_parameter("nm.block1.conv.weight")
        assert torch.equal(kernel[:, 0], kernel[:, 2])


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (lambda: released(small()), 84, "ANML has 36 tensors at --size 84, not 28"),
        (
            lambda: higher_state(small()) | {"rln.convBlock2.norm.weight": torch.ones(4)},
            None,
            r"rln\.convBlock2\.norm\.weight is \[4\] where ANML has pln\.block2\.norm\.weight \[6\]$",
        ),
        (lambda: higher_state(small()) | {"fc.bias": torch.ones(0)}, None, r"fc\.bias is empty"),
        (lambda: dict([*higher_state(small()).items()][1:]), None, "holds 27 tensors and is neither"),
        (lambda: gemcl(1).state_dict(), 8, "--size 8 is too small"),
        (lambda: gemcl(1, blocks=5).state_dict(), None, "holds 35 tensors and is neither"),
        (
            lambda: gemcl(1).state_dict() | {"layers.1.0.bias": torch.ones(3)},
            None,
            r"layers\.1\.0\.bias is \[3\], layers\.1\.1\.running_mean \[2\]$",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    make: Callable[[], object], size: int | None, message: str, tmp_path: Path
) -> None:
    save(tmp_path / "in.net", make())
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "in.net", size)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(zipped: bool, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "in.net"
    net = small()
    save(path, released(net, Trap(sprung)), zipped)
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
    save(path, released(small()), zipped)
    data = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(convert_released, "PICKLES", 100)
        with pytest.raises(UserError, match=r"in\.net"):
            convert(path)
    for kept in range(0, len(data) - 1, len(data) // 30):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=r"in\.net"):
            convert(path)
