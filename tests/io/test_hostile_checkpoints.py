"""Checkpoints made to hang a reader, to exhaust memory or to run something: each is refused, in a moment."""

import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxmed.cli import main
from jaxmed.errors import InputError
from jaxmed.io import pickles
from jaxmed.io.pickles import LARGEST_PICKLE, read_checkpoint
from jaxmed.models.published.load import load_published

pytestmark = pytest.mark.core
REFERENCES = Path(__file__).resolve().parents[1] / "references"
SECONDS = 5
STEPS = 60_000  # in place of MOST_STEPS, so that the checks of types, which slow all calls here, cost little
GIB = 1 << 30


def doubling(tail, times=60):
    """A tuple of two, each of two, ...: 2^60 to whoever looks at all of it; memo 0 holds it."""
    return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * times + tail


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def same_hash(count):
    """Integers that all have the hash 0."""
    return [integer(number * (2**61 - 1)) for number in range(1, count)]


def storage_of(count, key="0"):
    """A reference to a storage of floats, on the stack."""
    return (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"J"
        + struct.pack("<i", count)
        + b"tQ"
    )


def tensor(storage, shape, stride):
    numbers = [b"(" + b"".join(integer(n) for n in axes) + b"t" for axes in (shape, stride)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers[0] + numbers[1] + b"\x89NtR"


PROGRAMS = {
    # Hash, comparison, text and references of what doubles.
    "hash of a key": doubling(b"}h\x00Ns."),
    "hash in a set": doubling(b"\x8f(h\x00\x90."),
    "hash in a frozenset": doubling(b"(h\x00\x91."),
    "hash in a dict of pairs": doubling(b"ccollections\nOrderedDict\n(((h\x00NtltR."),
    "hash in a builtin set": doubling(b"cbuiltins\nset\n((h\x00ltR."),
    "hash in a counter": doubling(b"ccollections\nCounter\n(}h\x00NstR."),
    "reference": doubling(b"h\x00Q."),
    "reference of five": doubling(b"(" + b"h\x00" * 5 + b"tQ."),
    "reference by key": doubling(b"(" + text("storage") + b"ctorch\nFloatStorage\nh\x00" + text("cpu") + b"K\x01tQ."),
    "reference by count": doubling(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") * 2 + b"h\x00tQ."),
    "text of a state's owner": doubling(b"h\x00h\x00b."),
    "text of a function": doubling(b"h\x00h\x00R."),
    "text of a layout": doubling(b"ctorch.serialization\n_get_layout\n(h\x00tR."),
    "text of a device": doubling(b"ctorch\ndevice\n(h\x00tR."),
    "text of a path": doubling(b"cpathlib\nPath\n(h\x00tR."),
    "text of a number": doubling(b"cbuiltins\nint\n(h\x00tR."),
    "text of a dtype": doubling(b"cnumpy\ndtype\n(h\x00tR."),
    "shape": doubling(b"cnumpy\nndarray\n(tR(K\x01h\x00cnumpy\ndtype\n(S'f4'\ntRI00\nS''\ntb."),
    "size": doubling(b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_of(1) + b"K\x00h\x00h\x00\x89NtR."),
    "path that doubles": b"\x80\x02" + text("aa") + b"q\x00" + b"cpathlib\nPath\n(h\x00h\x00tRq\x00" * 60 + b".",
    # Depth.
    "nested lists": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 5_000 + b".",
    "nested dicts": b"\x80\x02" + b"}K\x01" * 9_000 + b"N" + b"s" * 9_000 + b".",
    "nested states": b"\x80\x02c__main__\nA\n)\x81" + b"c__main__\nA\n)\x81" * 9_000 + b"b" * 9_000 + b".",
    "marks": b"\x80\x02" + b"(" * 2 * STEPS + b".",
    # Number.
    "one opcode": b"\x80\x02" + b"N" * 2 * STEPS + b".",
    "a line without end": b"\x80\x02c" + b"9" * (1 << 22),
    "digits": b"\x80\x02I" + b"9" * (1 << 22) + b"\n.",
    "copies of a list": b"\x80\x02(" + b"K\x01" * 5_000 + b"tq\x000cbuiltins\nlist\nq\x01"
    + b"h\x01h\x00\x85R0" * 5_000 + b"h\x00.",
    "copies of a dict": b"\x80\x02}(" + b"".join(integer(n) + b"N" for n in range(9_000))
    + b"uq\x000cargparse\nNamespace\n)Rq\x01" + b"h\x00b" * 5_000 + b".",
    "copies of a text": b"\x80\x02" + text("a" * (1 << 22)) + b"q\x000c_codecs\nencode\nq\x01"
    + (b"h\x01(h\x00" + text("latin1") + b"tR0") * 5_000 + b"h\x00.",
    # Collisions: every key has the hash of every other.
    "one hash in a dict": b"\x80\x02}(" + b"N".join([b"", *same_hash(9_000)])[1:] + b"Nu.",
    "one hash in a set": b"\x80\x02\x8f(" + b"".join(same_hash(9_000)) + b"\x90.",
    "one hash in pairs": b"\x80\x02ccollections\nOrderedDict\n(("
    + b"".join(n + b"N\x86" for n in same_hash(9_000)) + b"ltR.",
    "one hash of tuples": b"\x80\x02}("
    + b"".join(b"(" + b"".join(integer(-1 - (n >> i & 1)) for i in range(16)) + b"tN" for n in range(1_000)) + b"u.",
    # Sizes.
    "a storage that is not there": tensor(storage_of(2**31 - 1), [4], [1]) + b".",
    "bytes that were never written": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"1234.",
    "a number that was never written": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1234.",
    "a frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
}  # fmt: skip


def archive(path, program, *members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("a/data.pkl", program)
        for name, content in members:
            file.writestr(name, content)
    return path


def legacy(path, program):
    parts = (pickles.LEGACY_MAGIC, 1001, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts) + program + pickle.dumps([], 2))
    return path


def refusal(path):
    """Return the line by which a file is refused; it takes a moment."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    assert time.process_time() - began < SECONDS
    line = str(caught.value)
    assert line.startswith(f"{path}: expected ") and "\n" not in line and len(line) < 900
    return line


@pytest.mark.parametrize("layout", [archive, legacy], ids=["zip", "bare"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_would_hang_or_fill_the_memory_are_refused_at_once(tmp_path, monkeypatch, name, layout):
    monkeypatch.setattr(pickles, "MOST_STEPS", STEPS)
    if name == "a frame beyond the end":  # frames are hints: the values are there
        assert read_checkpoint(layout(tmp_path / "a.pth", PROGRAMS[name])) is None
        return
    refusal(layout(tmp_path / "a.pth", PROGRAMS[name]))


def test_a_pickle_of_a_gibibyte_is_not_expanded(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("a/data.pkl", "w") as member:
            block = b"N" * (1 << 24)
            for _ in range(LARGEST_PICKLE // len(block) + 1):
                member.write(block)
    assert f"at most {LARGEST_PICKLE:,} bytes in a/data.pkl, found more" in refusal(path)


def test_archives_of_many_gibibytes_are_not_read(tmp_path):
    """What the table of contents claims, compressed and not, and six storages in a file that is mostly a hole."""
    path, count = tmp_path / "a.pth", 2 * GIB - 1
    program = b"\x80\x02}" + text("w") + tensor(storage_of(count), [count], [1]) + b"s."
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        archive(path, program, ("a/data/0", b"0" * 64), compression=compression)
        claim(path, 1, 4 * count & 0xFFFFFFFF)
        refusal(path)
    size = 3 << 28
    numbers = [tensor(storage_of(size // 4, str(key)), [size // 4], [1]) for key in range(6)]
    program = b"\x80\x02}" + b"".join(text(str(key)) + one + b"s" for key, one in enumerate(numbers)) + b"."
    archive(path, program, *((f"a/data/{key}", b"") for key in range(6)))
    for key in range(6):
        claim(path, 1 + key, size)
    assert "at most 4 GiB of tensors in a pickled checkpoint" in refusal(path)


def claim(path, number, size):
    """Change what the table of contents says of the size of a member."""
    content, place = bytearray(path.read_bytes()), -1
    for _ in range(number + 1):
        place = content.index(b"PK\x01\x02", place + 1)
    for offset in (20, 24) if content[place + 10] == 0 else (24,):
        content[place + offset : place + offset + 4] = struct.pack("<I", size)
    path.write_bytes(content)


def test_a_table_of_contents_without_end_is_not_read(tmp_path):
    path = archive(tmp_path / "a.pth", b"\x80\x02N.", *((f"a/data/{'0' * 100}{key}", b"") for key in range(60)))
    content = bytearray(path.read_bytes())
    assert read_checkpoint(path) is None
    end = content.index(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    table = bytes(content[start:end])
    with path.open("wb") as file:
        file.write(content[:start] + table * 1000)
        file.write(content[end : end + 8] + struct.pack("<HHIIH", 61000, 61000, len(table) * 1000, start, 0))
    assert "at most 8,388,608 bytes of table of contents" in refusal(path)


def test_many_tensors_of_one_storage_in_another_order_are_bounded(tmp_path):
    """Each would be a copy of the whole: two are read, four hundred are not."""
    values = np.arange(1 << 16, dtype=np.float32)

    def write(count):
        first = b"\x80\x02]" + storage_of(1 << 16) + b"q\x05" + b"0"
        turned = b"".join(tensor(b"h\x05", [256, 256], [1, 256]) + b"a" for _ in range(count))
        return archive(tmp_path / "a.pth", first + turned + b".", ("a/data/0", values.tobytes()))

    found = read_checkpoint(write(2))
    np.testing.assert_array_equal(found[1], values.reshape(256, 256).T)
    assert "bytes of tensors in another order" in refusal(write(400))


@pytest.mark.parametrize(
    "name",
    ["os system", "posix system", "nt system", "subprocess Popen", "builtins eval", "builtins exec",
     "builtins __import__", "builtins open", "builtins compile", "importlib import_module", "sys exit",
     "shutil rmtree", "socket socket", "ctypes CDLL", "pty spawn", "runpy run_path", "types CodeType",
     "types FunctionType", "operator attrgetter", "functools reduce", "webbrowser open", "code interact",
     "pdb run", "timeit timeit", "multiprocessing Process", "__builtin__ eval", "os.path join", "asyncio run",
     "pickle loads", "io open", "tempfile mktemp", "marshal loads"],
)  # fmt: skip
def test_names_of_python_that_are_no_data_are_refused(tmp_path, name):
    module, attribute = name.split()
    short = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, attribute)]
    for mention in (f"c{module}\n{attribute}\n".encode(), b"".join(short) + b"\x93"):
        for tail in (b"(tR", b""):  # called, or only mentioned
            path = archive(tmp_path / "a.pth", b"}" + text("x") + mention + tail + b"s.")
            assert "which was not run" in refusal(path)


@pytest.mark.parametrize(
    "name", ["torch.hub load", "numpy.testing._private.utils runstring", "pip main", "torch._dynamo.repro run", "a.b C"]
)
def test_names_of_packages_are_placeholders_that_run_nothing(tmp_path, name):
    module, attribute = name.split()
    made = f"c{module}\n{attribute}\n(".encode() + text("import os; os.abort()") + b"tR"
    path = archive(tmp_path / "a.pth", b"}" + text("x") + made + b"s.")
    found = read_checkpoint(path)["x"]
    assert (found.name, found.args) == (f"{module}.{attribute}", ("import os; os.abort()",))
    assert "was not made" in refusal(archive(tmp_path / "a.pth", made + b"."))


def test_tensors_that_repeat_one_number_are_no_weights(tmp_path, capsys):
    """A storage of one number behind tensors of a petabyte: their shapes are right, and nobody makes copies of them."""
    shapes = {
        "patch_embed.proj.weight": [4096, 1, 64, 64, 64],
        "pos_embed": [1, 4097, 4096],
        "blocks.0.norm1.weight": [4096],
        "norm.weight": [2**40, 1024],
    }
    entries = b"".join(
        text(name) + tensor(storage_of(1), shape, [0] * len(shape)) + b"s" for name, shape in shapes.items()
    )
    path = archive(tmp_path / "a.pth", b"\x80\x02}" + entries + b".", ("a/data/0", bytes(4)))
    began = time.process_time()
    assert main(["weights", "show", str(path), "--heads", "4"]) == 2
    assert time.process_time() - began < SECONDS
    error = capsys.readouterr().err
    assert error.startswith(f"jaxmed: {path}: expected tensors that fit into its") and error.count("\n") == 1


def write_state(path, tensors):
    """Write arrays as PyTorch writes tensors of their own storages."""
    program, members = b"\x80\x02}", []
    for key, (name, array) in enumerate(tensors.items()):
        strides = [step // array.itemsize for step in np.ascontiguousarray(array).strides]
        program += text(name) + tensor(storage_of(array.size, str(key)), list(array.shape), strides) + b"s"
        members.append((f"a/data/{key}", array.tobytes()))
    return archive(path, program + b".", *members)


def test_what_has_no_place_in_the_model_is_not_read(tmp_path):
    """Nor is anything of a model whose shapes do not fit: bytes that are damaged, or endless, are never looked at."""
    state = dict(read_checkpoint(REFERENCES / "tangerine_mae_24.pth")["model"])
    state["queue"] = np.full(16, 7, np.float32)
    path = write_state(tmp_path / "a.pth", state)
    content = bytearray(path.read_bytes())
    content[content.index(state["queue"].tobytes())] ^= 1
    path.write_bytes(content)
    published = load_published(path, heads=2, decoder_heads=4)
    assert published.report.left_over == ("queue",) and published.report.missing == ()
    np.testing.assert_array_equal(published.params["encoder"]["class_token"], state["cls_token"][0, 0])
    content[content.index(state["blocks.0.norm1.weight"].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="found a damaged or other file"):
        load_published(path, heads=2, decoder_heads=4)
    with pytest.raises(InputError, match="expected weights of a possible model, found heads"):
        load_published(path, heads=5, decoder_heads=4)


def test_a_quantized_tensor_in_the_model_is_named(tmp_path):
    made = b"ctorch._utils\n_rebuild_qtensor\n(K\x01tR"
    whole = tensor(storage_of(1), [1], [1])
    program = b"\x80\x02}" + text("norm.weight") + whole + b"s" + text("fc.weight") + made + b"s."
    with pytest.raises(InputError, match="found fc.weight made by torch._utils._rebuild_qtensor; save them dense"):
        load_published(archive(tmp_path / "a.pth", program, ("a/data/0", bytes(4))))
