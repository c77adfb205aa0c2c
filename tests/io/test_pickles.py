"""Checkpoints without torch: both layouts by hand, refusals without side effects, torch itself."""

import argparse
import datetime
import decimal
import enum
import fractions
import functools
import io
import os
import pathlib
import pickle
import random
import re
import struct
import sys
import types
import uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict, namedtuple

import ml_dtypes
import numpy as np
import pytest

from jaxmed.errors import InputError
from jaxmed.io.pickle_names import Unread
from jaxmed.io.pickles import read_checkpoint

MAGIC = 0x1950A86A20F9469CFC6C


class FakeTensor:
    """Pickles as torch's tensors do: a rebuild function over a persistent storage."""

    def __init__(self, storage, size, stride, offset=0, rebuild="_rebuild_tensor_v2", extra=()):
        self.args = (storage, offset, size, stride, False, OrderedDict(), *extra)
        self.rebuild = rebuild

    def __reduce__(self):
        return getattr(sys.modules["torch._utils"], self.rebuild), self.args


class FakeStorage:
    def __init__(self, kind, values):
        self.kind, self.values = kind, values


@pytest.fixture
def torch_names(monkeypatch):
    """Stand in for torch while a test pickles; pickle wants to find what it names."""

    def module(name, **names):
        created = types.ModuleType(name)
        for key, value in names.items():
            if not isinstance(value, type):
                value.__module__, value.__qualname__ = name, key
            else:
                value.__module__ = name
            setattr(created, key, value)
        monkeypatch.setitem(sys.modules, name, created)
        return created

    def function(name):
        return types.FunctionType((lambda *a: None).__code__, {}, name)

    kinds = ["Float", "Half", "BFloat16", "Long", "Bool", "Byte", "Double", "ComplexFloat"]
    storages = {f"{kind}Storage": type(f"{kind}Storage", (), {}) for kind in kinds}
    names = {"Size": type("Size", (), {}), "device": type("device", (), {})}
    torch = module("torch", **storages, **names)
    rebuilds = [
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_qtensor",
    ]
    module("torch._utils", **{name: function(name) for name in rebuilds})
    module("torch._tensor", _rebuild_from_type_v2=function("_rebuild_from_type_v2"))
    module("torch.storage", UntypedStorage=type("UntypedStorage", (), {}))
    return torch


def pickled(content, protocol=2, legacy=False):
    """Pickle with storages by reference; return the bytes and the storages in order."""
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, FakeStorage):
                return None
            key = str(len([k for k in storages if storages[k] is not item]))
            key = next((k for k in storages if storages[k] is item), key)
            storages[key] = item
            place = "torch.storage" if item.kind.startswith("Untyped") else "torch"
            kind = getattr(sys.modules[place], item.kind)
            reference = ("storage", kind, key, "cuda:0", item.values.size)
            return (*reference, None) if legacy else reference

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(content)
    return stream.getvalue(), storages


def save_zip(path, content, protocol=2, order="little"):
    data, storages = pickled(content, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", order)
        for key, storage in storages.items():
            values = storage.values
            values = values.astype(values.dtype.newbyteorder(">")) if order == "big" else values
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def save_legacy(path, content, protocol=2, little=True):
    data, storages = pickled(content, protocol, legacy=True)
    with path.open("wb") as file:
        pickle.dump(MAGIC, file, protocol)
        pickle.dump(1001, file, protocol)
        system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
        pickle.dump(system, file, protocol)
        file.write(data)
        pickle.dump(sorted(storages), file, protocol)
        for key in sorted(storages):
            values = storages[key].values
            values = values if little else values.astype(values.dtype.newbyteorder(">"))
            file.write(struct.pack("<q", values.size) + values.tobytes())
    return path


def sample(torch):
    """A state dict with every way in which tensors lie in their storages, and its truth."""
    values = np.arange(24, dtype=np.float32)
    shared = FakeStorage("FloatStorage", values)
    half = np.arange(4, dtype=np.float16)
    brain = np.arange(4).astype(ml_dtypes.bfloat16)
    state = OrderedDict(
        weight=FakeTensor(shared, (2, 3, 4), (12, 4, 1)),
        transposed=FakeTensor(shared, (4, 3), (1, 4)),
        part=FakeTensor(shared, (2, 2), (12, 1), 5),
        expanded=FakeTensor(shared, (5, 3), (0, 1), 2),
        scalar=FakeTensor(shared, (), (), 7),
        nothing=FakeTensor(shared, (0, 3), (3, 1)),
        half=FakeTensor(FakeStorage("HalfStorage", half), (2, 2), (2, 1)),
        brain=FakeTensor(FakeStorage("BFloat16Storage", brain), (4,), (1,)),
        count=FakeTensor(FakeStorage("LongStorage", np.array([5])), (), ()),
        mask=FakeTensor(FakeStorage("BoolStorage", np.array([True, False])), (2,), (1,)),
    )
    state._metadata = OrderedDict([("", {"version": 1})])
    truth = {
        "weight": values.reshape(2, 3, 4),
        "transposed": values[:12].reshape(3, 4).T,
        "part": np.array([[5, 6], [17, 18]], np.float32),
        "expanded": np.tile(values[2:5], (5, 1)),
        "scalar": np.float32(7),
        "nothing": np.zeros((0, 3), np.float32),
        "half": half.reshape(2, 2),
        "brain": brain,
        "count": np.int64(5),
        "mask": np.array([True, False]),
    }
    return state, truth


@pytest.mark.core
@pytest.mark.parametrize(
    ("save", "protocol"),
    # Protocol 0 cannot hold references to storages, and the bare stream began with protocol 2.
    [(save_zip, protocol) for protocol in (1, 2, 3, 4, 5)] + [(save_legacy, protocol) for protocol in (2, 3, 4, 5)],
)
def test_both_layouts_are_read_in_every_protocol(tmp_path, torch_names, save, protocol):
    state, truth = sample(torch_names)
    config = argparse.Namespace(lr=1e-4, layers=[1, 2], out=pathlib.PurePosixPath("runs/a"))
    content = {
        "model": state,
        "epoch": 3,
        "args": config,
        "big": 2**70,
        "name": "ü",
        "none": None,
        "ok": True,
        "set": {1, 2},
        "raw": b"\x00\xff",
        "numpy": np.arange(6).reshape(2, 3).T,
        "number": np.float64(0.5),
        "pair": (1, (2.5, -3)),
    }
    path = save(tmp_path / "a.pth", content, protocol)
    found = read_checkpoint(path)
    model = found.pop("model")
    assert type(model) is dict and list(model) == list(truth)
    for name, array in truth.items():
        assert isinstance(model[name], np.ndarray)
        assert model[name].dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(model[name], array)
    assert np.shares_memory(model["weight"], model["part"]) or model["part"].size == 4
    np.testing.assert_array_equal(found.pop("numpy"), content["numpy"])
    assert found == {
        **{key: content[key] for key in ("epoch", "big", "name", "none", "ok", "set", "raw")},
        "args": {"lr": 1e-4, "layers": [1, 2], "out": "runs/a"},
        "number": 0.5,
        "pair": (1, (2.5, -3)),
    }


@pytest.mark.core
def test_byte_orders_are_honoured(tmp_path, torch_names):
    state, truth = sample(torch_names)
    del state["brain"]  # NumPy has no big-endian bfloat16
    for path in (
        save_zip(tmp_path / "a.pt", state, order="big"),
        save_legacy(tmp_path / "b.bin", state, little=False),
    ):
        found = read_checkpoint(path)
        for name in state:
            np.testing.assert_array_equal(found[name], truth[name])
            assert found[name].dtype.isnative


@pytest.mark.core
def test_parameters_and_untyped_storages_are_tensors(tmp_path, torch_names):
    values = np.arange(6, dtype=np.float32)
    tensor = FakeTensor(FakeStorage("FloatStorage", values), (2, 3), (3, 1))

    class Parameter:
        def __reduce__(self):
            rebuild = sys.modules["torch._utils"]._rebuild_parameter
            return rebuild, (tensor, True, OrderedDict())

    class Dtype:
        def __reduce__(self):
            return "bfloat16"

    torch_names.bfloat16 = Dtype()
    Dtype.__module__ = "torch"
    brain = values.astype(ml_dtypes.bfloat16)
    raw = FakeStorage("UntypedStorage", brain.view(np.uint8))
    third = FakeTensor(raw, (2,), (2,), 1, "_rebuild_tensor_v3", (torch_names.bfloat16, None))
    path = save_zip(tmp_path / "a.pth", {"p": Parameter(), "t": third, "d": torch_names.bfloat16})
    found = read_checkpoint(path)
    np.testing.assert_array_equal(found["p"], values.reshape(2, 3))
    np.testing.assert_array_equal(found["t"], brain[[1, 3]])
    assert found["d"] == ml_dtypes.bfloat16


class Call:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.core
@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickles_are_refused_and_not_run(tmp_path, torch_names, save, protocol):
    mark = tmp_path / "owned"
    attacks = {
        "system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "open": Call(open, str(mark), "w"),
        "getattr": Call(getattr, "", "format"),
        "_rebuild_qtensor": Call(sys.modules["torch._utils"]._rebuild_qtensor, 1),
    }
    for name, attack in attacks.items():
        path = save(tmp_path / "a.pth", {"model": attack}, protocol)
        with pytest.raises(InputError, match="which was not run") as caught:
            read_checkpoint(path)
        assert name in caught.value.found
        assert not mark.exists()


@pytest.mark.core
@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch owned'\ntR.",
        b"(S'touch owned'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch owned'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",
        b"cbuiltins\ndict\n(dS'update'\nI1\nsb.",
        b"ccollections\nOrderedDict\n(dS'move_to_end'\nI1\nsb.",
        b"(lp0\ng0\na.",
        b"\x80\x02}q\x00(K\x01h\x00u.",
        b"]]]]\x86\x86R.",
        b"I1\nI2\nR.",
        b"cbuiltins\nlist\n(I3\ntR.",
        b"h\x07.",
        b"R.",
        b"u.",
        b"\x82\x01.",
        b"ccopyreg\n_reconstructor\n(cbuiltins\nset\ncbuiltins\nobject\nNtR.",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\nI0\nI1\ntRS'abc'\ntR.",
        b"garbage",
        b"",
    ],
)
def test_odd_programs_end_in_a_refusal(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", program)
    with pytest.raises(InputError, match="a.pth: expected"):
        read_checkpoint(tmp_path / "a.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.core
def test_deeply_shared_lists_cost_nothing(tmp_path):
    # 2^60 lists if each were visited where it is mentioned.
    program = b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (index + 1, index, index) for index in range(60))
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", program + b".")
    assert len(read_checkpoint(tmp_path / "a.pth")) == 2


class Kind(enum.Enum):
    FIRST = 1


class Settings(dict):
    """As attribute dicts of training frameworks: a dict of another name."""


class Names(list):
    pass


class Config:
    """As the nodes of a configuration: attributes, a parent that is itself, tensors among them."""

    def __init__(self, **content):
        self.content, self.parent = content, self


Pair = namedtuple("Pair", "first second")


@pytest.mark.core
@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_training_codes_keep_beside_their_tensors_is_inert_and_the_tensors_are_found(
    tmp_path, torch_names, save, protocol
):
    """Each of these alone, and all of them in one file; what is not read is named, with what the file says of it."""
    plain = {
        "counter": (Counter({"a": 2, 5: 1, np.int64(3): 4}), {"a": 2, 5: 1, 3: 4}),
        "defaultdict": (defaultdict(list, {"x": [1]}), {"x": [1]}),
        "namespace": (argparse.Namespace(heads=4), {"heads": 4}),
        "simple namespace": (types.SimpleNamespace(heads=4), {"heads": 4}),
        "settings": (Settings(lr=0.1, more=Settings(a=1)), {"lr": 0.1, "more": {"a": 1}}),
        "list": (Names(["a", "b"]), ["a", "b"]),
        "path": (pathlib.PureWindowsPath("a/b"), "a/b"),
        "bytes": (bytearray(b"12"), bytearray(b"12")),
        "numpy scalar": (np.float32(0.5), 0.5),
        "numpy bool": (np.bool_(True), True),
        "numpy text": (np.array(["ab", "c"]), np.array(["ab", "c"])),
        "numpy empty": (np.zeros((0, 3)), np.zeros((0, 3))),
        "class": (defaultdict(Config), {}),
        "range key": ({(1, "a"): 2}, {(1, "a"): 2}),
        "infinite": (float("inf"), float("inf")),
    }
    unread = {
        "enum": Kind.FIRST,
        "config": Config(rate=0.1, deeper=Config(a=1)),
        "named tuple": Pair(1, 2),
        "date": datetime.datetime(2026, 1, 2, 3, 4),
        "days": datetime.timedelta(days=3),
        "decimal": decimal.Decimal("1.5"),
        "fraction": fractions.Fraction(1, 3),
        "uuid": uuid.UUID(int=7),
        "random": random.Random(0),
        "pattern": re.compile("a.*"),
        "partial": functools.partial(Config, 1),
        "range": range(3),
        "slice": slice(1, 2),
        "objects": np.array([{}, None], object),
        "dates": np.array(["2026-01-01"], "M8[D]"),
        "record": np.zeros(2, [("a", "f4"), ("b", "i2")]),
        "generator": np.random.default_rng(0),
    }
    values = np.arange(6, dtype=np.float32)
    content = {name: pair[0] for name, pair in plain.items()} | unread
    for names in (*([name] for name in content), list(content)):
        tensor = FakeTensor(FakeStorage("FloatStorage", values), (2, 3), (3, 1))
        path = save(tmp_path / "a.pth", {"before": tensor, **{name: content[name] for name in names}}, protocol)
        found = read_checkpoint(path)
        np.testing.assert_array_equal(found["before"], values.reshape(2, 3))
        for name in names:
            if name in plain:
                np.testing.assert_equal(found[name], plain[name][1])
            else:
                assert isinstance(found[name], Unread), name
    assert found["config"].name.endswith("Config") and found["config"].state["content"]["rate"] == 0.1
    assert found["config"].state["parent"] is found["config"]
    assert found["date"].name == "datetime.datetime" and found["enum"].name.startswith(__name__)


@pytest.mark.core
def test_only_what_is_chosen_is_read(tmp_path, torch_names):
    """An optimizer's moments may be damaged: nobody looks at them."""
    good, bad = (FakeStorage("FloatStorage", np.full(4, value, np.float32)) for value in (1, 2))
    content = {"model": {"w": FakeTensor(good, (4,), (1,))}, "optimizer": {"m": FakeTensor(bad, (4,), (1,))}}
    path = save_zip(tmp_path / "a.pth", content)
    data = bytearray(path.read_bytes())
    data[data.index(bad.values.tobytes())] ^= 1
    path.write_bytes(data)
    found = read_checkpoint(path, lambda content: content["model"])
    np.testing.assert_array_equal(found["w"], good.values)
    with pytest.raises(InputError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.core
def test_tensors_with_attributes_are_tensors(tmp_path, torch_names):
    values = np.arange(6, dtype=np.float32)
    inner = FakeTensor(FakeStorage("FloatStorage", values), (6,), (1,))
    reduced = inner.__reduce__()

    class Subclass:
        def __reduce__(self):
            maker = sys.modules["torch._tensor"]._rebuild_from_type_v2
            return maker, (reduced[0], torch_names.Tensor, reduced[1], {"tag": 1})

    torch_names.Tensor = type("Tensor", (), {})
    torch_names.Tensor.__module__ = "torch"
    found = read_checkpoint(save_zip(tmp_path / "a.pth", {"w": Subclass()}))
    np.testing.assert_array_equal(found["w"], values)


@pytest.mark.core
def test_tensors_that_reach_out_of_their_storage_are_refused(tmp_path, torch_names):
    storage = FakeStorage("FloatStorage", np.zeros(6, np.float32))
    for size, stride, offset in [
        ((7,), (1,), 0),
        ((2, 3), (3, 1), 1),
        ((2,), (10**15,), 0),
        ((2,), (1,), -1),
        ((2,), (-1,), 3),
        ((2, 2), (1,), 0),
        ((2**62, 2**62), (0, 0), 0),
    ]:
        path = save_zip(tmp_path / "a.pth", FakeTensor(storage, size, stride, offset))
        with pytest.raises(InputError, match="a.pth"):
            read_checkpoint(path)
    wide = FakeTensor(storage, (10**6, 10**6, 6), (0, 0, 1))
    assert read_checkpoint(save_zip(tmp_path / "a.pth", wide)).shape == (10**6, 10**6, 6)


@pytest.mark.core
def test_wrong_files_are_told(tmp_path, torch_names):
    state, _ = sample(torch_names)
    path = tmp_path / "a.pth"
    packed = save_zip(path, state).read_bytes()
    bare = save_legacy(path, state).read_bytes()
    data, _ = pickled(state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    without_tensors = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    document = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/constants.pkl", b"N.")
    script = path.read_bytes()
    flipped = bytearray(packed)
    flipped[packed.index(np.arange(24, dtype="f4").tobytes()) + 4] ^= 1
    for content, words in [
        (packed[: len(packed) // 2], "damaged"),
        (bytes(flipped), "damaged"),
        (bare[:-3], "ends before its last tensor"),
        (bare[: len(bare) // 3], "damaged"),
        (without_tensors, "damaged"),
        (document, "without data.pkl"),
        (script, "TorchScript"),
        (b"weights", "not a checkpoint"),
        (pickle.dumps({"a": 1}), "another kind"),
        (b"", "empty"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            read_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: expected ")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.peers
@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoints_of_torch_itself_are_read(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.BatchNorm3d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 2, 4, 4, 4)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "slice": base[:, 1:, ::2],
        "expanded": base[0, 0].expand(5, 4),
        "parameter": torch.nn.Parameter(base.clone()),
        "channels_last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
        **{
            str(dtype): (base > 9).to(dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8)
            + (torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64)
        },
    }
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tensors": tensors,
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("a/b")),
        "size": base.shape,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "numpy": np.random.default_rng(0).normal(size=(2, 3)),
        "number": np.float32(1.5),
    }
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(path)
    for group in ("model", "tensors"):
        assert list(found[group]) == list(content[group])
        for name, tensor in content[group].items():
            tensor = tensor.detach()
            is_brain = tensor.dtype == torch.bfloat16
            assert (found[group][name].dtype == ml_dtypes.bfloat16) == is_brain
            expected = tensor.float().numpy() if is_brain else tensor.numpy()
            np.testing.assert_array_equal(found[group][name].astype(expected.dtype), expected)
    step = found["optimizer"]["state"][0]["exp_avg"]
    np.testing.assert_array_equal(step, optimizer.state_dict()["state"][0]["exp_avg"].numpy())
    assert found["args"] == {"lr": 0.1, "out": "a/b"}
    assert found["size"] == (2, 3, 4)
    assert found["dtype"] == ml_dtypes.bfloat16
    assert found["device"] == "cpu"
    np.testing.assert_array_equal(found["numpy"], content["numpy"])
    assert found["number"] == np.float32(1.5)


@pytest.mark.peers
@pytest.mark.parametrize("is_zip", [True, False])
def test_whatever_torch_saves_beside_a_state_dict_is_no_hindrance(tmp_path, is_zip):
    """What torch.load allows with weights_only, and the whole objects of a training loop, each alone and together."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    beside = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
        "whole module": model,
        "whole optimizer": optimizer,
        "whole schedule": schedule,
        "loss": torch.nn.CrossEntropyLoss(),
        "function": torch.nn.functional.gelu,
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "layout": torch.strided,
        "devices": [torch.device("cuda", 0), torch.device("cpu")],
        "version": torch.torch_version.TorchVersion("2.0"),
        "parameters": [torch.nn.Parameter(torch.ones(2)), torch.nn.parameter.Buffer(torch.ones(2))],
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "uint16": torch.ones(3, dtype=torch.uint16),
        "date": datetime.datetime(2026, 1, 2),
    }
    for names in (*([name] for name in beside), list(beside)):
        content = {"model": model.state_dict(), **{name: beside[name] for name in names}}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
        found = read_checkpoint(tmp_path / "a.pth", lambda content: content["model"])
        np.testing.assert_array_equal(found["weight"], model.weight.detach().numpy(), err_msg=str(names))


@pytest.mark.peers
@pytest.mark.parametrize("is_zip", [True, False])
def test_whole_modules_of_torch_are_refused_by_name(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match=r"torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "a.pth")
