import errno

import pytest

from fedbiot_trainer import PayloadError
from fedbiot_trainer.engines.package_store import PackageStore
from fedbiot_trainer.wire.frame import encode
from fedbiot_trainer.wire.shipment import MAX_FILES, PackageFile, PackageList, read_piece


CONTENT = {"config.json": b"{}", "model.safetensors": bytes(range(250)), "client_lora/adapter_model.safetensors": b"a" * 40,
           "chat_template.jinja": b""}  # fmt: skip


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def store(tmp_path):
    return PackageStore(tmp_path / "site")


def deliver(store, listed, folder, limit=None):
    files = {file.name: file for file in listed.files}
    sent = 0
    for piece in listed.pieces(store.had(listed), size=100):
        name, offset, content = read_piece(piece.read(folder))
        store.write(files[name], offset, content)
        sent += 1
        if sent == limit:
            return sent
    store.assemble(listed)
    return sent


def test_a_package_arrives_file_by_file(package, store):
    listed = PackageList.from_bytes(PackageList.of(package).to_bytes())
    assert listed == PackageList.of(package) and listed.size == sum(map(len, CONTENT.values()))
    assert deliver(store, listed, package) == 1 + 3 + 1 + 1
    folder = store.path(listed)
    assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
    assert deliver(store, listed, package) == 0


def test_a_cut_delivery_goes_on_where_it_was(package, store):
    listed = PackageList.of(package)
    assert deliver(store, listed, package, limit=4) == 4
    assert store.had(listed) == {"chat_template.jinja": 0, "client_lora/adapter_model.safetensors": 40, "config.json": 2,
                                 "model.safetensors": 100}  # fmt: skip
    assert not store.path(listed).exists()
    assert deliver(store, listed, package) == 2
    assert (store.path(listed) / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]


def test_what_two_packages_have_in_common_is_sent_once(package, store):
    first = PackageList.of(package)
    deliver(store, first, package)
    (package / "client_lora" / "adapter_model.safetensors").write_bytes(b"b" * 40)
    second = PackageList.of(package)
    assert deliver(store, second, package) == 1
    assert not store.path(first).exists() and len(list(store.files.iterdir())) == len(CONTENT)


def test_digests_are_taken_once(package):
    known = {}
    listed = PackageList.of(package, known)
    assert len(known) == len(CONTENT)
    wrong = dict.fromkeys(known, "0" * 64)
    assert {file.sha256 for file in PackageList.of(package, wrong).files} == {"0" * 64}
    assert PackageList.of(package, known) == listed


def test_a_file_that_arrives_damaged_begins_anew(package, store):
    listed = PackageList.of(package)
    file = next(file for file in listed.files if file.name == "client_lora/adapter_model.safetensors")
    with pytest.raises(PayloadError, match="has arrived with the digest '[0-9a-f]{64}', expected"):
        store.write(file, 0, memoryview(b"b" * 40))
    assert file.name not in store.had(listed)
    deliver(store, listed, package)
    assert store.path(listed).is_dir()


@pytest.mark.parametrize("offset, size", [(1, 10), (0, 41), (40, 1)])
def test_a_piece_that_does_not_follow(package, store, offset, size):
    file = next(file for file in PackageList.of(package).files if file.size == 40)
    with pytest.raises(PayloadError, match="but 0 are here"):
        store.write(file, offset, memoryview(b"a" * size))


ALTERED = {"cut": lambda content: content[:10], "flipped": lambda content: content[:-1] + b"x"}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_file_that_was_altered_on_the_disk_comes_anew(package, store, alter):
    """A site that is started looks at what it has; while it runs it has that in memory."""
    listed = PackageList.of(package)
    deliver(store, listed, package)
    weights = store.path(listed) / "model.safetensors"
    weights.write_bytes(alter(CONTENT["model.safetensors"]))  # which is the file of the store too
    started = PackageStore(store.folder)
    assert "model.safetensors" not in started.had(listed) and not started.path(listed).exists()
    assert deliver(started, listed, package) == 3
    assert weights.read_bytes() == CONTENT["model.safetensors"]


def test_a_file_that_is_gone_from_the_package_is_put_back(package, store):
    listed = PackageList.of(package)
    deliver(store, listed, package)
    (store.path(listed) / "config.json").unlink()
    assert deliver(PackageStore(store.folder), listed, package) == 0  # it is in the store
    assert (store.path(listed) / "config.json").read_bytes() == CONTENT["config.json"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_was_written_and_not_looked_at(package, store, damaged):
    """The site ended, or its disk was full, between the last byte of a file and its place."""
    listed = PackageList.of(package)
    file = next(file for file in listed.files if file.name == "config.json")
    (store.files / f"{file.sha256}.part").write_bytes(b"[]" if damaged else b"{}")
    assert store.had(listed) == ({} if damaged else {"config.json": 2})
    deliver(store, listed, package)
    assert (store.path(listed) / "config.json").read_bytes() == b"{}"


def test_a_full_disk_loses_nothing_that_was_here(package, store, monkeypatch):
    listed = PackageList.of(package)
    deliver(store, listed, package, limit=4)
    had = store.had(listed)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context, pytest.raises(OSError, match="No space left"):
        context.setattr("os.fsync", full)
        deliver(store, listed, package)
    assert store.had(listed).keys() == had.keys()
    deliver(store, listed, package)
    assert (store.path(listed) / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["modeling.py", "pytorch_model.bin", "../config.json", "/etc/a.json", "a/b.json", ".json", "client_lora/../a.json", "x.so",
     "a\nb.json", "ü.json", "a" * 300 + ".json", "client_lora/.hidden.json", "a..json"],
    ids=ascii,
)  # fmt: skip
def test_what_is_no_file_of_a_package(name):
    data = encode({"files": [{"name": name, "size": 1, "sha256": "0" * 64}]}, b"")
    with pytest.raises(PayloadError, match="a site takes weights and settings alone"):
        PackageList.from_bytes(data)


FILE = {"name": "a.json", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files, reason",
    [
        (None, "has files None, expected"),
        ([1], r"has files \[1\], expected"),
        ([FILE | {"more": 1}], "expected name, size and sha256 of each"),
        ([], "has 0 files"),
        ([FILE, FILE], "has 2 files, expected 1 to 300 of different names"),
        ([FILE | {"name": f"a{i}.json"} for i in range(MAX_FILES + 1)], "has 301 files"),
        ([FILE | {"size": -1}], "has a size of -1 bytes"),
        ([FILE | {"size": True}], "has a size of True bytes"),
        ([FILE | {"sha256": "../x"}], "which is no SHA-256"),
        ([FILE | {"name": 3}], "has a file 3"),
    ],
    ids=range(10),
)
def test_a_list_that_is_none(files, reason):
    with pytest.raises(PayloadError, match=reason):
        PackageList.from_bytes(encode({"files": files}, b""))


@pytest.mark.parametrize(
    "place", [{"file": 1, "offset": 0}, {"file": "a", "offset": -1}, {"file": "a"}, {"file": "a", "offset": 1.0}]
)
def test_a_piece_that_is_none(place):
    with pytest.raises(PayloadError, match="expected a name and a place in it"):
        read_piece(encode(place, b"x"))


def test_the_source_may_not_hold_code(package):
    (package / "modeling_own.py").write_text("import os")
    with pytest.raises(
        PayloadError, match="has a file 'modeling_own.py', but a site takes weights and settings alone"
    ):
        PackageList.of(package)


def test_names_of_files():
    assert PackageFile("tokenizer.model", 1, "0" * 64).check() is None
    assert PackageFile("additional_chat_templates/tool_use.jinja", 1, "0" * 64).check() is None  # transformers' folder
    assert PackageFile("model-00001-of-00002.safetensors", 1, "0" * 64).check() is None
    assert PackageFile("model.safetensors.index.json", 1, "0" * 64).check() is None
