"""Confines one program: run as a script, by the interpreter alone (`python -I -S launcher.py spec.json`).

    launcher ──► init of new namespaces ──► the program, as another user, in a root of its own, with limits
        │              └─ waits for it, writes the report; when it ends the kernel ends everything in them
        └─ waits for init; ends with the process that started it

Where the kernel does not permit namespaces, and the recipe allows that, there is no init: the program is a child of
the launcher, which kills all its descendants afterwards. What was achieved is in the report. Only the standard
library is imported: this starts for every run.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
from typing import Any, NoReturn

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
FIRST_UID = 64_000
"""Programs of root run as one of a thousand users from here on: each has its own count of processes."""
SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
GRACE_SECONDS = 5
"""Beyond the deadline, after which init ends by itself should nobody end it."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError when a call of libc has failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [word.encode() if word else None for word in (source, target, kind)]
    check(_LIBC.mount(*words, ctypes.c_ulong(flags), options.encode() or None), f"mount of {target}")


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def read_only(root: str) -> None:
    """All mounts below `root`, and no set-uid programs in them."""
    attributes = _MountAttr(attr_set=MS_RDONLY | MS_NOSUID)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = _LIBC.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, ctypes.byref(attributes), size
    )  # fmt: skip
    check(result, "mount_setattr")


def build_root(spec: dict[str, Any]) -> None:
    """A file system with the interpreter, the system's libraries, the program and an empty /tmp, and go there."""
    root = spec["root"]
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    for path in (*SYSTEM, *spec["prefixes"], *DEVICES):
        place = root + path
        if os.path.lexists(place) or not os.path.lexists(path):
            continue
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        if os.path.isdir(path):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        mount(path, place, "", MS_BIND | MS_REC)
    for name in ("program", "proc", "tmp"):
        os.mkdir(f"{root}/{name}")
    mount(spec["program"], f"{root}/program", "", MS_BIND)
    try:
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV)
    except PermissionError:  # in a container whose own /proc is masked; Python does without
        os.rmdir(f"{root}/proc")
    read_only(root)
    size = f"mode=1777,size={spec['limits']['folder_bytes']},nr_inodes=4096"
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chroot(root)
    os.chdir("/tmp")


def enter_namespaces() -> None:
    """Processes, network, mounts, IPC and host name of their own. Raises OSError when the kernel refuses."""
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if os.geteuid() == 0:
        check(_LIBC.unshare(flags), "unshare")
        return
    uid, gid = os.getuid(), os.getgid()
    check(_LIBC.unshare(flags | NEWUSER), "unshare")
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def become(uid: int) -> None:
    """A user that owns nothing. Raises OSError."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def set_limits(limits: dict[str, int]) -> None:
    cpu = limits["cpu_seconds"]
    for which, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(which, (soft, hard))


def start_program(spec: dict[str, Any], report: int, *, drop: bool) -> int:
    """Fork; the child becomes the program. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(spec["stdin_fd"], 0)
        if drop:
            become(spec["uid"])
        set_limits(spec["limits"])
        check(_LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        check(_LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        os.set_inheritable(report, False)
        os.closerange(3, report)
        os.closerange(report + 1, 4096)
        os.execve(spec["command"][0], spec["command"], spec["env"])
    except BaseException as error:  # noqa: BLE001 - told in the report; nothing of the launcher may run on here
        write(report, {"error": f"the program could not be started: {error}"})
    os._exit(126)


def write(report: int, said: dict[str, Any]) -> None:
    os.pwrite(report, json.dumps(said).encode(), 0)


def wait_for(program: int, report: int, confined: dict[str, str]) -> None:
    """Reap until the program has ended, and say how."""
    while True:
        pid, status, _ = os.wait4(-1, 0)
        if pid == program:
            break
    if os.fstat(report).st_size:  # it was never started
        return
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = os.waitstatus_to_exitcode(status)
    write(report, {"code": code, "cpu_seconds": used.ru_utime + used.ru_stime, "confined": confined})


def run_as_init(spec: dict[str, Any], report: int, alive: int) -> NoReturn:
    """In the new namespaces: everything in them ends with this process."""
    try:
        check(_LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        watch = select.poll()
        watch.register(alive, 0)
        if watch.poll(0):  # the launcher was gone before the kernel was asked
            os._exit(1)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
        signal.alarm(math.ceil(spec["limits"]["seconds"]) + GRACE_SECONDS)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        build_root(spec)
        confined = {
            "processes": "own",
            "network": "none",
            "files": "own",
            "user": "other" if spec["root_user"] else "own",
        }
        wait_for(start_program(spec, report, drop=spec["root_user"]), report, confined)
    except BaseException as error:  # noqa: BLE001 - told in the report
        write(report, {"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def run_without(spec: dict[str, Any], report: int) -> None:
    """No namespaces: limits, and another user when this one is root and that one can run the interpreter."""
    check(_LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    drop = spec["root_user"] and _others_may_run(spec["command"][0])
    if drop:
        os.chmod(spec["work"], 0o777)
    os.chdir(spec["work"])
    spec["command"][-1] = f"{spec['program']}/main.py"
    spec["env"]["HOME"] = spec["env"]["TMPDIR"] = spec["work"]
    user = "other" if drop else "same"
    try:
        program = start_program(spec, report, drop=drop)
        wait_for(program, report, {"processes": "shared", "network": "open", "files": "shared", "user": user})
    finally:
        end_descendants()


def _others_may_run(python: str) -> bool:
    try:
        os.seteuid(FIRST_UID)
    except OSError:
        return False
    try:
        return os.access(python, os.X_OK, effective_ids=True)
    finally:
        os.seteuid(0)


def end_descendants() -> None:
    """Kill children, and theirs when they have become ours, until there are none."""
    while True:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as children:
                for pid in children.read().split():
                    os.kill(int(pid), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def stop(*_: object) -> NoReturn:
    """SIGTERM: end what was started, then ourselves."""
    end_descendants()
    os._exit(143)


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    check(_LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if os.getppid() != spec["parent"]:
        return
    signal.signal(signal.SIGTERM, stop)
    report = os.open(spec["report"], os.O_CREAT | os.O_WRONLY, 0o600)
    spec["stdin_fd"] = os.open(spec["stdin"], os.O_RDONLY)
    spec["root_user"] = os.geteuid() == 0
    spec["uid"] = FIRST_UID + os.getpid() % 1_000
    try:
        enter_namespaces()
    except OSError as error:
        if spec["isolation"] == "full":
            write(report, {"refused": str(error)})
        else:
            run_without(spec, report)
        return
    ours, alive = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(ours)
        run_as_init(spec, report, alive)
    os.close(alive)
    os.waitpid(init, 0)


main()
