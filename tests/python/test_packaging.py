"""Files that are installed with the program: units, completions, manual pages, and the Debian package that contains them.
scripts/check-package.sh installs the package in a clean Debian."""

import hashlib
import re
import shutil
import subprocess

import pytest
import yaml

from support import REPO, clean_environment, service

UNITS = sorted((REPO / "packaging/systemd").glob("*.service"))


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=80, env=clean_environment(), **options
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def program(*arguments, **options):
    return run(service("CCAT_TRANSFER_BIN"), *arguments, **options)


def commands(*path):
    """Every command that the program's help shows."""
    text = program(*path, "--help")
    found = re.search(r"^Commands:\n((?:  .*\n)+)", text, re.M)
    names = re.findall(r"^  (\w[\w-]*)", found[1], re.M) if found else []
    for name in set(names) - {"help"}:
        yield (*path, name)
        yield from commands(*path, name)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_units(unit, tmp_path):
    installed = tmp_path / unit.name
    installed.write_text(unit.read_text().replace("/usr/bin/ccat-transfer", service("CCAT_TRANSFER_BIN")))
    said = subprocess.run(["systemd-analyze", "--man=no", "verify", installed], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_use_existing_flags(unit):
    """The program accepts the flags of ExecStart."""
    (start,) = re.findall(r"^ExecStart=/usr/bin/ccat-transfer (\w+)(.*)$", unit.read_text(), re.M)
    help_text = program(start[0], "--help")
    for flag in re.findall(r"--[a-z-]+", start[1]):
        assert flag in help_text


def test_completions_know_every_command():
    paths = list(commands())
    assert len(paths) > 10
    for shell in ("bash", "zsh", "fish"):
        script = program("completions", shell)
        missing = [path for path in paths if path[-1] not in script]
        assert not missing, (shell, missing)
    run("bash", "-n", input=program("completions", "bash"))
    # The completions that the shell would offer.
    script = program("completions", "bash")
    (function,) = set(re.findall(r"complete -F (\S+)", script))
    words = "COMP_WORDS=(ccat-transfer manag) COMP_CWORD=1"
    asked = f'{script}\n{words}\n{function} ccat-transfer manag ccat-transfer\necho "${{COMPREPLY[@]}}"\n'
    assert run("bash", input=asked).split() == ["manager"]


def test_there_is_a_page_for_every_command(tmp_path):
    program("man", tmp_path / "man1")
    pages = {page.name for page in (tmp_path / "man1").iterdir()}
    assert pages == {"ccat-transfer.1"} | {"-".join(("ccat-transfer", *path)) + ".1" for path in commands()}
    assert not [page for page in pages if "fault-points" in page]


def test_manual_commands_need_no_settings(tmp_path):
    """The package is built on machines without a service's settings."""
    (tmp_path / "bad.toml").write_text("[nonsense]\n")
    assert program("--config", tmp_path / "bad.toml", "completions", "zsh")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not installed")
def test_the_package(tmp_path):
    built = subprocess.run(
        [REPO / "scripts/package.sh", tmp_path],
        env=clean_environment(BINARY=service("CCAT_TRANSFER_BIN"), COMPRESSION="none"),
        capture_output=True,
        text=True,
        timeout=80,
    )
    assert built.returncode == 0, built.stderr
    package = built.stdout.strip()
    root = tmp_path / "root"
    run("dpkg-deb", "--raw-extract", package, root)
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert there >= {
        "usr/bin/ccat-transfer",
        "etc/ccat-transfer/ccat-transfer.env",
        "etc/logrotate.d/ccat-transfer",
        "usr/lib/sysusers.d/ccat-transfer.conf",
        "usr/share/man/man1/ccat-transfer.1.gz",
        "usr/share/bash-completion/completions/ccat-transfer",
        *(f"lib/systemd/system/{unit.name}" for unit in UNITS),
    }
    # The control data that dpkg reads are right.
    sums = dict(reversed(line.split("  ")) for line in (root / "DEBIAN/md5sums").read_text().splitlines())
    assert set(sums) == {name for name in there if not name.startswith("DEBIAN/")}
    for name, expected in sums.items():
        assert hashlib.md5((root / name).read_bytes()).hexdigest() == expected, name
    conffiles = (root / "DEBIAN/conffiles").read_text().split()
    assert all((root / name.lstrip("/")).is_file() for name in conffiles)
    assert {f"/{name}" for name in there if name.startswith("etc/")} == set(conffiles)
    for script in ("postinst", "prerm", "postrm"):
        run("sh", "-n", root / "DEBIAN" / script)
    # The installed settings are valid, and the program in the package runs.
    run(root / "usr/bin/ccat-transfer", "--config", root / "etc/ccat-transfer/ccat-transfer.toml", "config", "check")
    listing = run("dpkg-deb", "--contents", package).splitlines()
    assert all(line.split()[1] == "root/root" for line in listing)
    (secret,) = [line for line in listing if line.endswith("ccat-transfer.env")]
    assert secret.startswith("-rw-r-----")


@pytest.mark.skipif(not shutil.which("logrotate"), reason="logrotate is not installed")
def test_logrotate_reads_its_file(tmp_path):
    """logrotate accepts the package's file and renames a log. (test_process.py: the worker then makes a new one.)"""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "worker.log").write_text("line\n")
    rules = (REPO / "packaging/debian/ccat-transfer.logrotate").read_text()
    rules = rules.replace("/var/log/ccat-transfer", str(logs))
    # The user of the package does not exist here.
    rules = re.sub(r"^ *su .*$", "", rules, flags=re.M)
    (tmp_path / "rules").write_text(rules)
    (tmp_path / "rules").chmod(0o600)
    run(shutil.which("logrotate"), "--force", "--state", tmp_path / "state", tmp_path / "rules")
    assert [path.name for path in logs.iterdir()] == ["worker.log.1"]


def test_compose_uses_only_defined_names():
    """Checks compose.yaml without Docker."""
    compose = yaml.safe_load((REPO / "packaging/compose/compose.yaml").read_text())
    services = compose["services"]
    for name, one in services.items():
        assert set(one.get("depends_on", {})) <= set(services), name
        for volume in one.get("volumes", []):
            source = volume.split(":")[0] if not volume.startswith("${") else None
            assert source is None or source in compose["volumes"] or source.startswith("./"), (name, volume)
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", [])), f"{name} is open to everybody"
        if one.get("image") == "ccat-transfer":
            command, *flags = one["command"]
            known = program(*([command] if command != "db" else ["db", flags.pop(0)]), "--help")
            assert all(flag.partition("=")[0] in known for flag in flags), name
    dockerfile = (REPO / "packaging/docker/Dockerfile").read_text()
    assert re.search(r"^USER ccat-transfer$", dockerfile, re.M)
    version = re.search(r'^rust-version = "(\d+\.\d+)"', (REPO / "Cargo.toml").read_text(), re.M)[1]
    image = re.search(r"^FROM rust:(\d+\.\d+)-", dockerfile, re.M)[1]
    assert tuple(map(int, image.split("."))) >= tuple(map(int, version.split(".")))
