"""The tables of scripts/bench/disk: disk.py RESULTS ROUNDS CONTENDER…; the first Pontoon is what ratios are of."""
import collections, os, statistics, sys

path, rounds, *contenders = sys.argv[1:]
names = {"pontoon": "Pontoon", "before": "before", "microvm": "QEMU microvm", "pc": "QEMU pc"}
figures = collections.defaultdict(list)
release = {}
for line in open(path):
    who, what, value = line.split()
    if what == "release":
        release[who] = value
    else:
        figures[who, what].append(float(value))
missing = False


def median(who, what):
    global missing
    values = figures[who, what]
    missing |= not values
    return statistics.median(values) if values else None


def shown(value):
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(rows):
    others = [who for who in contenders if who != "pontoon"]
    print("| |", " | ".join([names[who] for who in contenders] + [f"/ {names[who]}" for who in others]), "|")
    print("|---" * (1 + len(contenders) + len(others)) + "|")
    for what, title in rows:
        values = {who: median(who, what) for who in contenders}
        ours = values.get("pontoon")
        ratios = [f"{ours / values[who]:.2f}" if ours is not None and values[who] else "–" for who in others]
        print("|", title, "|", " | ".join([shown(values[who]) for who in contenders] + ratios), "|")


print(f"Median of {rounds}, µs per request; guest Linux {release['guest']} on emulated Linux {release['host']}, "
      f"QEMU {release['qemu']}; {os.cpu_count()} CPUs below, load {os.getloadavg()[0]:.1f}\n")
table([
    ("raw-read1m", "raw image: read 1 MiB"),
    ("raw-write1m", "… write 1 MiB"),
    ("raw-read4k", "… read 4 KiB"),
    ("raw-read4x4k", "… read 4 KiB, four at a time"),
    ("raw-write4k", "… write 4 KiB"),
    ("raw-sync4k", "… write 4 KiB and flush"),
    ("over-write1m", "overlay: write 1 MiB, new"),
    ("over-rewrite1m", "… write 1 MiB, again"),
    ("over-read1m", "… read 1 MiB, written"),
    ("over-write4k", "… write 4 KiB, new"),
    ("over-rewrite4k", "… write 4 KiB, again"),
    ("over-read4k", "… read 4 KiB, not written"),
    ("over-sync4k", "… write 4 KiB and flush"),
])
print("\nCounted, per request:\n")
table([
    ("count-read-calls", "read 4 KiB: system calls of the monitor"),
    ("count-read-exits", "… exits"),
    ("count-read-interrupts", "… interrupts"),
    ("count-write-calls", "write 4 KiB: system calls of the monitor"),
    ("count-write-exits", "… exits"),
    ("count-write-interrupts", "… interrupts"),
])
sys.exit(1 if missing else 0)
