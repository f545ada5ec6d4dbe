"""The secret that outlives a cluster."""

from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.secret import SECRET_BYTES, cluster_secret

pytestmark = pytest.mark.unit


def test_it_is_made_once_and_for_this_user_only(tmp_path: Path) -> None:
    secret = cluster_secret(tmp_path)
    assert len(secret) == SECRET_BYTES and len(set(secret)) > 1
    assert cluster_secret(tmp_path) == secret
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_another_home_has_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert cluster_secret(tmp_path / "a") != cluster_secret(tmp_path / "b")


def test_one_that_others_can_read_is_refused(tmp_path: Path) -> None:
    cluster_secret(tmp_path)
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ClusterError, match="chmod 600"):
        cluster_secret(tmp_path)


def test_one_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    cluster_secret(tmp_path)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ClusterError, match="5 bytes"):
        cluster_secret(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(bytes(SECRET_BYTES))
    (tmp_path / "elsewhere").chmod(0o600)
    (tmp_path / "secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ClusterError):
        cluster_secret(tmp_path)
