"""Key files: private, never overwritten, errors that name the file."""

import stat

import pytest

from policy_server import keys


def test_generated_keys_load_and_the_secret_is_private(tmp_path):
    public, secret = keys.generate(tmp_path / "keys", "robot")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert keys.load_secret(secret)[0] == keys.load_public(public)
    assert sorted(path.name for path in public.parent.iterdir()) == ["robot.key", "robot.key_secret"]
    assert b"secret-key" not in public.read_bytes()


def test_a_key_is_never_overwritten(tmp_path):
    keys.generate(tmp_path, "robot")
    before = (tmp_path / "robot.key_secret").read_bytes()
    with pytest.raises(keys.KeyFileError, match="exists"):
        keys.generate(tmp_path, "robot")
    assert (tmp_path / "robot.key_secret").read_bytes() == before


@pytest.mark.parametrize("name", ["", "../robot", "a b", "x" * 65])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(keys.KeyFileError, match="name"):
        keys.generate(tmp_path, name)


def test_a_secret_others_can_read_is_refused(tmp_path):
    _, secret = keys.generate(tmp_path, "robot")
    secret.chmod(0o644)
    with pytest.raises(keys.KeyFileError, match="chmod 600"):
        keys.load_secret(secret)


def test_wrong_files_are_named(tmp_path):
    public, _ = keys.generate(tmp_path, "robot")
    (tmp_path / "junk.key").write_text("hello")
    with pytest.raises(keys.KeyFileError, match="no secret key"):
        keys.load_secret(public)
    for name in ("missing.key", "junk.key"):
        with pytest.raises(keys.KeyFileError, match=name):
            keys.load_public(tmp_path / name)


def test_every_public_key_but_the_servers_is_allowed(tmp_path, caplog):
    for name in (keys.SERVER, "left", "right"):
        keys.generate(tmp_path, name)
    allowed = keys.AllowedClients(tmp_path)
    assert sorted(allowed.names().values()) == ["left", "right"]
    assert allowed.callback("*", keys.load_public(tmp_path / "left.key"))
    assert not allowed.callback("*", keys.load_public(tmp_path / "server.key"))
    (tmp_path / "half.key").write_text("half a file")
    with caplog.at_level("ERROR", "policy_server"):
        assert allowed.callback("*", keys.load_public(tmp_path / "right.key"))
        assert not allowed.callback("*", b"x" * 40)
    assert [r.getMessage().count("half.key: ") for r in caplog.records] == [1]
    (tmp_path / "half.key").unlink()
    (tmp_path / "left.key").unlink()
    assert keys.load_public(tmp_path / "right.key") in allowed.names()
    assert len(allowed.names()) == 1
