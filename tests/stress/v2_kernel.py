"""Run the control-group tests on a kernel whose CPU controller is in cgroup v2, in an emulated machine.

Covers: version 2 where the machine at hand has version 1 (or allows nothing). Nothing is installed and no privilege is
needed: a Debian kernel is unpacked, a root file system is made of this Python and the packages that the tests import,
and qemu boots both. Needs ``qemu-system-x86_64``, ``busybox`` (static), ``cpio`` and, for the kernel, ``apt-get`` and
``dpkg-deb`` (or ``--kernel``).

    apt-get install --no-install-recommends qemu-system-x86 busybox-static cpio
    python tests/stress/v2_kernel.py

Scenarios: a process in the root group; in a child group that has cpu and memory; an unprivileged user in a delegated
group; an unprivileged user without one. In the second and the third real models are served too, while groups are
removed, quotas changed, mounts made read-only and processes killed (tests/live/test_cgroup_faults.py).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ["attrs", "cgroupspy", "hypothesis", "numpy", "onnx", "onnxruntime", "pytest"]
APPLETS = ["sh", "mount", "umount", "unshare", "mkdir", "cat", "echo", "chown", "sleep", "poweroff", "ls", "uname"]
TESTS = "tests/live/test_cgroup_probe.py tests/live/test_scalers.py"
QUOTA_TESTS = "tests/live/test_cgroup_scaler.py tests/live/test_cgroup_v2.py"
FAULT_TESTS = "tests/live/test_cgroup_faults.py"
SCENARIOS = ["root-group", "child-group", "delegated-user", "unprivileged-user"]

INIT = r"""#!/bin/sh
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
mount -t cgroup2 none /sys/fs/cgroup
export PATH=/bin HOME=/tmp CI=true PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/packages:/sponge/src
cd /sponge
uname -r
C=/sys/fs/cgroup
sh /scenario root-group 0 $C @QUOTA_TESTS@
echo "+cpu +memory" > $C/cgroup.subtree_control
mkdir $C/app $C/delegated $C/foreign
sh /scenario child-group 0 $C/app @QUOTA_TESTS@ @FAULT_TESTS@
for file in . cgroup.procs cgroup.threads cgroup.subtree_control; do chown 1000:1000 $C/delegated/$file; done
sh /scenario delegated-user 1000 $C/delegated @QUOTA_TESTS@ @FAULT_TESTS@
sh /scenario unprivileged-user 1000 $C/foreign
poweroff -f
"""

SCENARIO = r"""
name=$1 user=$2
echo $$ > $3/cgroup.procs
shift 3
echo "=== $name"
@PYTHON@ /as_user.py $user -c "from sponge import CgroupScaler; print(CgroupScaler.probe().explain())"
@PYTHON@ /as_user.py $user -m pytest -p no:cacheprovider -o faulthandler_timeout=300 -rs --color=no @TESTS@ $*
echo "SPONGE-RESULT $name $?"
"""

AS_USER = """
import os, sys
user = int(sys.argv[1])
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def main() -> int:
    """Build the image, boot it, and report pytest's results; 0 if all scenarios passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a bzImage; by default Debian's cloud kernel is fetched")
    parser.add_argument("--timeout", type=float, default=3600, help="give up after this many seconds")
    parser.add_argument("--scenario", choices=SCENARIOS, help="only this one")
    parser.add_argument("--tests", default="", help="only these, of those with a quota")
    options = parser.parse_args()
    scenarios = [options.scenario] if options.scenario else SCENARIOS
    for tool in ("qemu-system-x86_64", "busybox", "cpio"):
        if shutil.which(tool) is None:
            print(f"{tool} is not installed: apt-get install qemu-system-x86 busybox-static cpio", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="sponge-v2-") as directory:
        work = Path(directory)
        kernel = options.kernel or fetch_kernel(work)
        image = build_image(work, scenarios, options.tests)
        print(f"image: {image.stat().st_size / 1e6:.0f} MB, kernel: {kernel.name}", flush=True)
        begin = time.monotonic()
        output = boot(kernel, image, options.timeout)
        print(f"the machine ran for {time.monotonic() - begin:.0f} s")
    results = dict(re.findall(r"SPONGE-RESULT (\S+) (\d+)", output))
    for name in scenarios:
        print(f"{name}: {'passed' if results.get(name) == '0' else 'FAILED'}")
    return 0 if all(results.get(name) == "0" for name in scenarios) else 1


def fetch_kernel(work: Path) -> Path:
    """Download Debian's cloud kernel and unpack it."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise SystemExit("apt knows no linux-image-cloud-amd64: run apt-get update, or pass --kernel")
    subprocess.run(["apt-get", "download", "-q", found[1]], cwd=work, check=True)
    (package,) = work.glob("linux-image-*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), "kernel"], cwd=work, check=True)
    return next((work / "kernel" / "boot").glob("vmlinuz-*"))


def build_image(work: Path, scenarios: list[str], tests: str) -> Path:
    """Pack busybox, this Python, the needed packages and the repository into an initramfs."""
    root = work / "root"
    for name in ("bin", "proc", "sys", "dev", "tmp", "packages", "sponge"):
        (root / name).mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "etc" / "passwd").write_text("root:x:0:0::/tmp:/bin/sh\nservice:x:1000:1000::/tmp:/bin/sh\n")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin" / "busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    python = copy_python(root)
    copy_packages(root / "packages")
    copy_shared_libraries(root)
    for name in ("src", "tests"):
        shutil.copytree(REPOSITORY / name, root / "sponge" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", root / "sponge")
    for name, text in (("init", INIT), ("scenario", SCENARIO), ("as_user.py", AS_USER)):
        text = text.replace("@PYTHON@", python).replace("@QUOTA_TESTS@", tests or QUOTA_TESTS)
        text = text.replace("@FAULT_TESTS@", "" if tests else FAULT_TESTS)
        text = text.replace("@TESTS@", "" if tests else TESTS)
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("sh /scenario") or line.split()[2] in scenarios]
        path = root / name
        path.write_text("".join(kept))
        path.chmod(0o755)
    image = work / "image.cpio"
    names = subprocess.run(["find", "."], cwd=root, capture_output=True, check=True).stdout
    with image.open("wb") as file:
        pack = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
        subprocess.run(pack, cwd=root, input=names, stdout=file, check=True)
    return image


def copy_python(root: Path) -> str:
    """Copy the interpreter, its standard library and the shared libraries of both; return the interpreter's path."""
    base = Path(sys.base_prefix)
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": str(base), "base": str(base)}))
    unneeded = ("__pycache__", "test", "site-packages", "dist-packages", "idlelib", "ensurepip", "config-*", "*.a")
    shutil.copytree(library, root / library.relative_to("/"), ignore=shutil.ignore_patterns(*unneeded))
    interpreter = Path(sys.executable).resolve()
    copy_file(interpreter, root)
    return str(interpreter)


def copy_shared_libraries(root: Path) -> None:
    """Copy what the binaries below *root* are linked with."""
    libraries: set[str] = set()
    for binary in [Path(sys.executable).resolve(), *root.rglob("*.so")]:
        listed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False).stdout
        libraries.update(re.findall(r"(/\S+) \(0x", listed))
    for path in libraries:
        copy_file(Path(path), root)


def copy_file(path: Path, root: Path) -> None:
    """Copy a file to the same place below *root*; a link becomes the file that it names."""
    target = root / path.relative_to("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def copy_packages(target: Path) -> None:
    """Copy the packages that the tests import, with what they need in turn."""
    waiting, seen = list(PACKAGES), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a requirement for other platforms or versions
        for file in package.files or []:
            if "__pycache__" not in file.parts and ".." not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target / file)
        waiting += [re.split(r"[^\w.-]", one)[0] for one in package.requires or [] if "extra ==" not in one]


def boot(kernel: Path, image: Path, timeout: float) -> str:
    """Boot the image in emulation, show what its console says, and return it."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,-avx2", "-smp", "2", "-m", "3G", "-nic", "none"),
        *("-nographic", "-no-reboot", "-kernel", str(kernel), "-initrd", str(image)),
        *("-append", "console=ttyS0 quiet panic=-1 rdinit=/init"),
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout is not None
    lines = []
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    return "".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
