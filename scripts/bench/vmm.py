"""The two halves of scripts/bench/vmm: `host PONTOON FOLDER ROUNDS` and `lab PONTOON FOLDER REPETITIONS`."""
import json, os, pathlib, platform, re, shutil, statistics, struct, subprocess, sys, time

MEMORY = 128  # MiB of each guest
QEMU = "qemu-system-x86_64"


def elf(code):
    """A program at 1 MiB: Pontoon enters it in 64-bit mode, QEMU (by its PVH note) in 32-bit mode."""
    base, at = 0x100000, 0x1000
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", base)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, at, base, base, len(code), len(code), at)
    notes = struct.pack("<IIQQQQQQ", 4, 4, 64 + 2 * 56, 0, 0, len(note), len(note), 4)
    return (head + load + notes + note).ljust(at, b"\0") + code


# The same bytes in both modes. mov dx,0x3f8; mov al,'!'; out dx,al
SAY = bytes.fromhex("66baf803 b021 ee")
# mov dx,0xf4; mov al,0; out dx,al: Pontoon's exit device, and QEMU's isa-debug-exit there
END = bytes.fromhex("66baf400 b000 ee")
# cli; 1: hlt; jmp 1b
PARK = bytes.fromhex("fa f4 ebfd")


def commands(pontoon, kernel):
    """Each contender with 1 vCPU, a console on standard output, and a NIC on its user-mode network."""
    return {
        "pontoon": [pontoon, "run", "--accel", "kvm", "--kernel", kernel, "--memory", f"{MEMORY}M"],
        "QEMU microvm": [
            QEMU, "-M", "microvm,accel=kvm,pit=off,pic=off,rtc=off,acpi=off,memory-backend=ram", "-m", str(MEMORY),
            # Guest memory is counted apart when it is shared, as Pontoon's is.
            "-object", f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel", kernel,
        ],
    }


def start(command):
    """The process, and when it was started, in seconds."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return child, began


def end(child):
    child.kill()
    child.wait()
    child.stdout.close()


def first_byte(command):
    child, began = start(command)
    if child.stdout.read(1) != b"!":
        raise SystemExit(f"no figure: the guest said nothing: {' '.join(command)}")
    took = time.perf_counter() - began
    end(child)
    return took * 1e3


def per_second(command, count):
    """Machines started and ended per second, one after the other, on one core."""
    began = time.perf_counter()
    for _ in range(count):
        subprocess.run(["taskset", "-c", "0", *command], stdin=subprocess.DEVNULL, capture_output=True)
    return count / (time.perf_counter() - began)


def own_memory(pid):
    """MB in memory that are not the guest's, which are shared: with the program's own pages, and without."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    kilobytes = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", text, re.M))
    return (int(kilobytes["RssAnon"]) + int(kilobytes["RssFile"])) / 1024, int(kilobytes["RssAnon"]) / 1024


def threads(pid):
    """Names of the threads; KVM's own are counted apart."""
    names = [path.joinpath("comm").read_text().strip() for path in pathlib.Path(f"/proc/{pid}/task").iterdir()]
    return [name for name in names if not name.startswith("kvm")]


def parked(command):
    child, _ = start(command)
    child.stdout.read(1)
    time.sleep(0.3)  # QEMU's helper threads come and go
    figures = *own_memory(child.pid), len(threads(child.pid))
    end(child)
    return figures


def system_calls(command, folder):
    """Those of all threads from exec to the first KVM_RUN."""
    trace = os.path.join(folder, "trace")
    subprocess.run(["timeout", "60", "strace", "-f", "-qq", "-e", "signal=none", "-o", trace, *command],
                   stdin=subprocess.DEVNULL, capture_output=True)
    lines = pathlib.Path(trace).read_text().splitlines()
    calls = [line for line in lines if "resumed>" not in line]
    return next(n for n, line in enumerate(calls) if "KVM_RUN" in line)


def size(program):
    """MB of the program with the libraries and the firmware that it needs."""
    paths = {os.path.realpath(shutil.which(program) or program)}
    linked = subprocess.run(["ldd", *paths], capture_output=True, text=True).stdout
    paths |= {os.path.realpath(path) for path in re.findall(r"(/\S+) \(0x", linked)}
    firmware = pathlib.Path("/usr/share/qemu/bios-microvm.bin")
    if program == QEMU and firmware.exists():
        paths.add(str(firmware.resolve()))
    return sum(os.path.getsize(path) for path in paths) / 1e6


def busy_probe(pontoon):
    """Pontoon's memory as own_memory tells it, after the probe has used the network."""
    orders = "dhcp;ping=192.168.122.1,count=100,interval=1;listen=9,timeout=4000"
    child, _ = start([pontoon, "run", "probe", "--accel", "kvm", "--memory", f"{MEMORY}M",
                      "--subnet", "192.168.122.0/24", "--cmdline", f"probe.do={orders}"])
    for line in child.stdout:
        if b'"order":"ping"' in line:
            break
    figure = own_memory(child.pid)
    end(child)
    return figure


def host(pontoon, folder, rounds):
    programs = {}
    for name, code in ("parks", SAY + PARK), ("ends", SAY + END + PARK):
        programs[name] = os.path.join(folder, name)
        pathlib.Path(programs[name]).write_bytes(elf(code))
    names = list(commands(pontoon, ""))
    park, once = commands(pontoon, programs["parks"]), commands(pontoon, programs["ends"])
    rows = []
    bytes_after = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            bytes_after[name].append(first_byte(park[name]))
    rows.append(("exec → first guest byte, ms, median", {n: statistics.median(bytes_after[n]) for n in names}, 1))
    rows.append(("… slowest", {n: max(bytes_after[n]) for n in names}, 1))
    rows.append(("started and ended per second, on one core", {n: per_second(once[n], rounds) for n in names}, 1))
    memory, private, count = {}, {}, {}
    for name in names:
        memory[name], private[name], count[name] = parked(park[name])
    rows.append(("memory beyond the guest's, network up, MB", memory, 1))
    rows.append(("… of it not shared with other machines", private, 1))
    busy = busy_probe(pontoon)
    rows.append(("… after a lease and 100 pings of the probe, shared pages included", {"pontoon": busy[0]}, 1))
    rows.append(("threads, without KVM's own", count, 0))
    rows.append(("system calls before the first KVM_RUN", {n: system_calls(once[n], folder) for n in names}, 0))
    rows.append(("program with its libraries, MB", {"pontoon": size(pontoon), "QEMU microvm": size(QEMU)}, 1))
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True).stdout.split("(")[0].split()[-1]
    print(f"{rounds} starts, guest of {MEMORY} MiB, 1 vCPU; QEMU {version}; Linux {platform.release()}, "
          f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    table(names, rows)


def table(names, rows):
    print(f"| | {' | '.join(names)} | {names[0]} / {names[1]} |\n|---|---|---|---|")
    for title, figures, digits in rows:
        cells = [f"{figures[name]:,.{digits}f}" if name in figures else "–" for name in names]
        both = all(name in figures for name in names)
        ratio = f"{figures[names[0]] / figures[names[1]]:.2f}" if both else "–"
        print(f"| {title} | {' | '.join(cells)} | {ratio} |")


# The rest is the lab's.

WRAPPER = """#!/bin/sh
# The lab's emulator for scripts/bench/vmm: one thread, and a clock that counts instructions.
for word; do
    shift
    case $word in tcg,thread=multi*) word="tcg,thread=single,tb-size=512" ;; esac
    set -- "$@" "$word"
done
exec {qemu} -icount shift=0,sleep=off "$@"
"""

# In the lab: nanoseconds of its clock from the start of a contender to the line of the guest's init. The first start fills the
# emulator's caches, and the lab's.
MEASURE = r"""
now() { while read -r a b t rest; do [ "$a $b" = "now at" ] && return; done </proc/timer_list; }
one() {
    rm -f out; mkfifo out; line=
    now; began=$t
    "$@" </dev/null >out 2>/dev/null & pid=$!
    while read -r line; do case $line in *"init is here"*) break ;; esac; done <out
    now; case $line in *"init is here"*) echo "figure $((t - began))" ;; esac
    kill $pid; wait $pid 2>/dev/null # timeout passes it on
}
for n in 0 1; do
    one timeout 20 CONTENDER
done
"""

# The same words for both; Pontoon's own come first, and the later ones count.
LINES = {
    "as Pontoon says": "console=ttyS0 panic=-1 cryptomgr.notests loglevel=3 reboot=t",
    "the kernel's own self-tests included": "console=ttyS0 panic=-1 cryptomgr.notests=0 loglevel=3 reboot=t",
}
CONTENDERS = {
    "pontoon": "./{program} run --accel kvm --kernel vmlinuz --initrd initrd --memory 256M --net none --cmdline '{line}'",
    "QEMU microvm": QEMU + " -M microvm,accel=kvm,pit=off,pic=off,rtc=off -cpu EPYC -m 256 -nodefaults -no-user-config"
                    " -display none -no-reboot -serial stdio -kernel vmlinuz -initrd initrd -append '{line}'",
}
# With counted time the emulated host sometimes never wakes from an idle moment; the run is then cut off and made again.
TRIES = 4


def init_program():
    """A static ELF program that writes its line and sleeps for ever."""
    text = b"init is here\n"
    base = 0x400000
    # mov eax,1; mov edi,1; mov esi,text; mov edx,len; syscall; 1: mov eax,34 (pause); syscall; jmp 1b
    code = b"\xb8\x01\0\0\0\xbf\x01\0\0\0\xbe" + struct.pack("<I", base + 0x100) + b"\xba" + struct.pack("<I", len(text))
    code += b"\x0f\x05" + b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7"
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + 0x80, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    size = 0x100 + len(text)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return ((head + load).ljust(0x80, b"\0") + code).ljust(0x100, b"\0") + text


def cpio(entries):
    """A newc archive of (name, mode, device, content)."""
    out = b""
    for n, (name, mode, (major, minor), content) in enumerate([*entries, ("TRAILER!!!", 0, (0, 0), b"")]):
        name = name.encode() + b"\0"
        fields = [n, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name), 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out = out.ljust(-(-len(out) // 4) * 4, b"\0") + content
        out = out.ljust(-(-len(out) // 4) * 4, b"\0")
    return out


def lab(pontoon, folder, repetitions):
    subprocess.run([pontoon, "image", "build", "debian"], check=True, stdout=subprocess.DEVNULL)
    listing = subprocess.run([pontoon, "image", "ls", "--json"], check=True, capture_output=True, text=True).stdout
    image = next(image for image in json.loads(listing) if image["name"] == "debian")
    # The lab knows its emulator by path and date, so that this one stays where it is, and as it is.
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    wrapper = cache / "pontoon" / "bench" / QEMU
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    text = WRAPPER.format(qemu=shutil.which(QEMU))
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.write_text(text)
        wrapper.chmod(0o755)
    initrd = pathlib.Path(folder, "initrd")
    initrd.write_bytes(cpio([("dev", 0o40755, (0, 0), b""), ("dev/console", 0o20600, (5, 1), b""),
                             ("init", 0o100755, (0, 0), init_program())]))
    environment = {**os.environ, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}

    def figure(contender):
        """Million instructions of a start; None when no try gave a figure."""
        script = pathlib.Path(folder, "measure")
        script.write_text(MEASURE.replace("CONTENDER", contender))
        command = [pontoon, "lab", "--cpus", "1", "--package", "qemu-system-x86", "--timeout", "60",
                   "--put", pontoon, "--put", image["kernel"], "--put", str(initrd), "--put", str(script), "--", "sh", "measure"]
        for _ in range(TRIES):
            run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            found = re.findall(r"^figure (\d+)$", run.stdout, re.M)
            if len(found) == 2:
                return int(found[1]) / 1e6
            print(f"no figure, once more (status {run.returncode}): {run.stderr.strip()[-200:]}", file=sys.stderr)
        return None

    rows = []
    for what, line in LINES.items():
        medians = {}
        for name, words in CONTENDERS.items():
            contender = words.format(program=os.path.basename(pontoon), line=line)
            values = [value for value in (figure(contender) for _ in range(repetitions)) if value is not None]
            if values:
                medians[name] = statistics.median(values)
        rows.append((f"exec → /init of the stock kernel, command line {what}, million instructions", medians, 0))
    print(f"\nMedian of {repetitions}, kernel {image['kernel_release']}, 256 MiB, 1 vCPU, no network\n")
    table(list(CONTENDERS), rows)


{"host": host, "lab": lab}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
