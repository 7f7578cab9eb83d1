"""tools/install.py: settings of pip given to uv, the notice of a CUDA build, a killed run."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tools import install

ROOT = Path(__file__).parents[1]

LISTED = """\
:env:.find-links='/wheels /more'
:env:.timeout='180'
global.cert='/certificates.crt'
global.constraint='/c.txt'
global.find-links='/replaced'
global.index-url='https://mirror.example/simple'
install.constraint='/d.txt'
download.pre='true'
global.progress-bar='off'
"""


def test_settings_of_pip_reach_uv() -> None:
    settings = install.pip_settings(LISTED)
    assert settings["constraint"] == "/d.txt"  # [install] over [global]
    arguments, variables = install.for_uv(settings)
    assert sorted(zip(arguments[::2], arguments[1::2], strict=True)) == [
        ("--constraint", "/d.txt"),
        ("--find-links", "/more"),
        ("--find-links", "/wheels"),
        ("--index-strategy", "unsafe-best-match"),
        ("--index-url", "https://mirror.example/simple"),
    ]
    assert variables == {"SSL_CERT_FILE": "/certificates.crt", "UV_HTTP_TIMEOUT": "180"}


@pytest.mark.parametrize("setting", ["proxy", "no-index", "pre", "client-cert", "of-next-year"])
def test_a_setting_that_uv_lacks_means_pip(setting: str) -> None:
    settings = install.pip_settings(f"global.{setting}='1'")
    with pytest.raises(install.NotForUv, match=f"pip is configured with {setting}, "):
        install.for_uv(settings)


@pytest.fixture
def linux_without_driver(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(install, "has_nvidia_driver", lambda: False)
    return monkeypatch


def test_a_cuda_build_without_a_driver_is_told(linux_without_driver: pytest.MonkeyPatch) -> None:
    notice = install.cuda_notice("Would install 1 package\n + torch==2.13.0\n")
    assert "CUDA build: about 2.7 GB to download" in notice
    assert f"TORCH_INDEX={install.CPU_INDEX}" in notice
    assert "unless pip is configured" in install.cuda_notice(None)


@pytest.mark.parametrize(
    "planned", [" + torch==2.13.0+cpu\n", "Would make no changes\n", "error: no network\n"]
)
def test_without_a_cuda_build_nothing_is_told(
    planned: str, linux_without_driver: pytest.MonkeyPatch
) -> None:
    assert install.cuda_notice(planned) == ""


def test_with_a_driver_or_off_linux_nothing_is_told(
    linux_without_driver: pytest.MonkeyPatch,
) -> None:
    planned = " + torch==2.13.0\n"
    linux_without_driver.setattr(install, "has_nvidia_driver", lambda: True)
    assert install.cuda_notice(planned) == ""
    linux_without_driver.setattr(install, "has_nvidia_driver", lambda: False)
    linux_without_driver.setattr(install.platform, "machine", lambda: "arm64")
    assert install.cuda_notice(planned) == ""


def made_up_package(site_packages: Path, name: str, *, record: bool = True) -> Path:
    (site_packages / f"{name}.py").write_text("")
    metadata = site_packages / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    if record:
        compiled = f"__pycache__/{name}.cpython-311.pyc,,\n"  # may be deleted by anyone
        (metadata / "RECORD").write_text(f"{name}.py,,\n{compiled}{metadata.name}/METADATA,,\n")
    return metadata


def test_a_package_that_was_written_in_part_is_forgotten(tmp_path: Path) -> None:
    whole = made_up_package(tmp_path, "whole")
    without_record = made_up_package(tmp_path, "begun", record=False)
    without_file = made_up_package(tmp_path, "torn")
    (tmp_path / "torn.py").unlink()
    assert install.forget_incomplete(tmp_path) == ["begun", "torn"]
    assert whole.exists()
    assert not without_record.exists()
    assert not without_file.exists()


def run_install(prefix: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [prefix / "bin" / "python", ROOT / "tools" / "install.py", *words],
        env={"PATH": str(prefix / "bin"), "HOME": str(prefix), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fake_uv(tmp_path: Path) -> Path:
    """An environment whose pip and uv print their arguments, pip its configuration besides."""
    prefix = tmp_path / "environment"
    venv.create(prefix, symlinks=True, with_pip=False)
    site_packages = next(prefix.glob("lib/python*/site-packages"))
    (site_packages / "pip.py").write_text(
        "import os, sys\n"
        "if sys.argv[-2:] == ['config', 'list']: print(os.environ.get('LISTED', ''))\n"
        "else: print('pip', *sys.argv[1:])\n"
    )
    uv = prefix / "bin" / "uv"
    uv.write_text(
        f'#!{sys.executable}\nimport os, sys\nprint("uv", *sys.argv[1:])\n'
        'sys.exit(int(os.environ.get("STATUS", "0")))\n'
    )
    uv.chmod(0o755)
    return prefix


def test_uv_installs_with_the_settings_of_pip(fake_uv: Path) -> None:
    done = run_install(
        fake_uv, "demo", "--torch-index", "file:///t", LISTED="global.find-links='/w'"
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"uv pip install --python {fake_uv / 'bin' / 'python'} ")
    assert "--find-links /w --extra-index-url file:///t " in line
    assert line.endswith("--constraint constraints.txt -e .[demo]")
    assert not (fake_uv / "installing").exists()


def test_pip_installs_where_uv_would_not_do_as_pip_is_told(fake_uv: Path) -> None:
    done = run_install(fake_uv, "dev", LISTED="global.proxy='http://proxy.example'")
    assert "pip is configured with proxy, which uv does not know: pip installs" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("-e .[dev]")
    assert "\nuv " not in done.stdout


def test_pip_installs_where_uv_fails_unless_uv_was_asked_for(fake_uv: Path) -> None:
    done = run_install(fake_uv, "demo", STATUS="2")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("pip ")
    done = run_install(fake_uv, "demo", "--installer", "uv", STATUS="2")
    assert done.returncode == 2
    assert (fake_uv / "installing").exists()


def test_pip_alone_when_asked_for(fake_uv: Path) -> None:
    done = run_install(fake_uv, "demo", "--installer", "pip")
    assert done.returncode == 0
    assert "uv " not in done.stdout
    assert done.stdout.splitlines()[-1].endswith(" --constraint constraints.txt -e .[demo]")
