"""What no honest guest sends, from a guest's TAP: known attacks made by scapy, then mutants of good packets. After every
hundred of them the gateway must answer a ping, which is also what keeps the TAP's queue from overflowing.

    hostile.py TAP SERVER PORT MUTANTS SEED
"""

import random
import socket
import struct
import sys

from scapy.all import ARP, BOOTP, DHCP, DNS, DNSQR, ICMP, IP, TCP, UDP, Dot1Q, Ether, Raw, conf, fragment, srp1

conf.verb = 0
tap, server, port, mutants = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dice = random.Random(int(sys.argv[5]))
guest, gateway = "192.168.122.2", "192.168.122.1"
door = srp1(Ether(dst="ff:ff:ff:ff:ff:ff") / ARP(pdst=gateway), iface=tap, timeout=20).hwsrc
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
wire.bind((tap, 0x0800))
wire.settimeout(20)
mac = ":".join("%02x" % b for b in wire.getsockname()[4])
eth = Ether(src=mac, dst=door)
up, gate = eth / IP(src=guest, dst=server), eth / IP(src=guest, dst=gateway)
syn = TCP(sport=4242, dport=port, flags="S", seq=1)


def options(data):
    """An IP header with these bytes as its options, whatever they mean."""
    header = IP(src=guest, dst=server, ihl=5 + len(data) // 4, len=20 + len(data) + 20, proto=6)
    header = bytes(header)[:10] + b"\0\0" + bytes(header)[12:20] + data
    return bytes(eth)[:12] + b"\x08\0" + summed(header, 20 + len(data)) + bytes(syn)


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def summed(packet, length):
    """The packet with a right header checksum."""
    return packet[:10] + checksum(packet[:10] + b"\0\0" + packet[12:length]) + packet[12:]


def consistent(frame):
    """The frame with right checksums of IPv4 and of what it carries, so that what is behind them gets its share."""
    if len(frame) < 34 or frame[12:14] != b"\x08\0":
        return frame
    frame = frame[:14] + summed(frame[14:34], 20) + frame[34:]
    at = {1: 36, 6: 50, 17: 40}.get(frame[23], len(frame))
    body = frame[34:at] + b"\0\0" + frame[at + 2 :]
    if len(body) != len(frame) - 34 or frame[23] == 17:
        return frame[:34] + body[: len(frame) - 34]
    pseudo = b"" if frame[23] == 1 else frame[26:34] + struct.pack("!HH", frame[23], len(body))
    return frame[:at] + checksum(pseudo + body) + frame[at + 2 :]


def shapes_of_ip():
    for ihl in 0, 4, 6, 15:
        yield eth / IP(src=guest, dst=server, ihl=ihl) / syn
    for length in 0, 19, 21, 41, 1501, 65535:
        yield eth / IP(src=guest, dst=server, len=length) / syn
    yield eth / IP(src=guest, dst=server, chksum=1) / syn
    yield eth / IP(src=guest, dst=server, version=6) / syn
    yield eth / IP(src=guest, dst=server, ttl=0) / syn
    yield eth / IP(src=guest, dst=server, proto=255) / Raw(b"x" * 40)
    for source in "0.0.0.0", "255.255.255.255", "127.0.0.1", "224.0.0.1", gateway, server:
        yield eth / IP(src=source, dst=server) / syn
        yield eth / IP(src=source, dst=gateway) / UDP(sport=53, dport=53) / Raw(b"x")
    for choice in b"\x07\x03", b"\x07\x00", b"\x07\xff", b"\x83\x27\x04", b"\x89\x0b\x04", b"\x44\x28\x05\x01", b"\xff":
        yield options(choice.ljust(40, b"\0"))
    yield options(b"\x01" * 40)


def fragments():
    # Teardrop: the second lies within the first. Then its relatives: a gap that never fills, one past the end of
    # the largest packet (the ping of death), an empty one, a last one in front of the others, and a flood of firsts.
    for first, second in (36, (24, 4)), (64, (0, 64)), (8, (8, 0)), (16, (65528, 1000)), (16, (65520, 8)):
        number = dice.randrange(65536)
        for offset, size, more in (0, first, 1), (second[0], second[1], 0):
            head = IP(src=guest, dst=server, id=number, flags=more, frag=offset // 8, proto=17)
            yield eth / head / Raw(bytes(UDP(sport=9, dport=9)) + b"x" * size)
    yield from reversed(fragment(gate / ICMP() / Raw(b"x" * 9000), fragsize=1400))
    for number in range(300):
        yield eth / IP(src=guest, dst=server, id=number, flags="MF", proto=17) / Raw(b"x" * 1400)


def transports():
    yield up / UDP(sport=1, dport=9)
    for length in 0, 7, 9, 65535:
        yield up / UDP(sport=1, dport=9, len=length) / Raw(b"")
    yield up / UDP(sport=0, dport=0, chksum=1) / Raw(b"x")
    for flags in "FSRPAUEC", "", "SF", "SR", "FPU", "A", "FA", "RA":
        yield up / TCP(sport=dice.randrange(65536), dport=port, flags=flags, urgptr=65535)
    for offset in 0, 4, 6, 15:
        yield up / TCP(sport=4243, dport=port, flags="S", dataofs=offset)
    yield up / TCP(sport=4244, dport=port, flags="S", chksum=1)
    for data in b"\x02\x00", b"\x02\xff", b"\x02\x04\0\0", b"\x03\x03\xff\0", b"\x05\x22" + b"\xff" * 32, b"\x08\x0a\x01\x01":
        raw = struct.pack("!HHIIBBHHH", 4245, port, 1, 0, 0xF0, 2, 1024, 0, 0) + data.ljust(40, b"\x02")
        yield eth / IP(src=guest, dst=server, proto=6) / Raw(raw)
    # Land: from the service to itself.
    for land in gateway, server:
        yield eth / IP(src=land, dst=land) / TCP(sport=53, dport=53, flags="S")
    quoted = bytes(IP(src=guest, dst=server) / syn)
    for kind in 3, 4, 5, 11, 12:
        for quote in b"", quoted[:3], quoted[:20], quoted, quoted * 20, b"\x4f" + quoted[1:]:
            yield up / ICMP(type=kind, code=dice.randrange(16), gw="10.77.0.66") / Raw(quote)
    yield up / ICMP(type=8, chksum=1)
    yield eth / IP(src=guest, dst=server, proto=1) / Raw(b"\x08")


def services():
    ask = UDP(sport=68, dport=67)
    for choices in [("message-type", 99)], [("message-type", "request")], [("hostname", b"x" * 250)] * 4:
        yield eth / IP(src="0.0.0.0", dst="255.255.255.255") / ask / BOOTP(chaddr=mac) / DHCP(options=choices)
    yield gate / ask / Raw(b"\x01\x01\xff\xff" + b"\xff" * 300)
    for question in b"", b"\0" * 12, b"\0\1\1\0\xff\xff" + b"\0" * 6, b"\0\1\1\0\0\1" + b"\0" * 6 + b"\xc0\x0c\0\1\0\1":
        yield gate / UDP(sport=5353, dport=53) / Raw(question)
    for bad in ARP(hwlen=200), ARP(ptype=1), ARP(op=9), ARP(op=2, psrc=gateway, pdst=guest), ARP(psrc="255.255.255.255"):
        yield eth / bad
    yield Ether(src="ff:ff:ff:ff:ff:ff", dst=door) / IP(src=guest, dst=server) / syn
    yield Ether(src=door, dst=door) / IP(src=guest, dst=server) / syn
    yield eth / Dot1Q(vlan=5) / IP(src=guest, dst=server) / syn
    for size in 0, 1, 19, 1486:
        yield bytes(eth)[:12] + b"\x08\0" + b"\x45" * size


def mutant(good):
    frame = bytearray(dice.choice(good))
    for _ in range(dice.randrange(1, 6)):
        # Mostly behind the addresses of Ethernet.
        frame[dice.randrange(12 if dice.random() < 0.9 else 0, len(frame))] = dice.choice((0, 1, 255, dice.randrange(256)))
    if dice.random() < 0.2:
        del frame[dice.randrange(14, len(frame)) :]
    if dice.random() < 0.1:
        frame += dice.randbytes(dice.randrange(1, 1400 - len(frame) if len(frame) < 1399 else 2))
    return consistent(bytes(frame)) if dice.random() < 0.7 else bytes(frame)


def ping(number):
    wire.send(bytes(gate / ICMP(type=8, id=0x5043, seq=number & 0xFFFF) / Raw(b"alive?")))
    want = b"\x50\x43" + struct.pack("!H", number & 0xFFFF) + b"alive?"
    while True:
        frame = wire.recv(65535)
        if frame[23] == 1 and frame[34] == 0 and frame[38:48] == want:
            return


def send(frames):
    count = 0
    for count, frame in enumerate(frames, 1):
        wire.send(bytes(frame)[:1514])
        if count % 100 == 0:
            ping(count)
    ping(count + 1)
    return count


known = [bytes(f) for case in (shapes_of_ip, fragments, transports, services) for f in case()]
good = [
    up / TCP(sport=4250, dport=port, flags="S", seq=7, options=[("MSS", 1460), ("WScale", 7), ("SAckOK", b"")]),
    up / TCP(sport=4250, dport=port, flags="PA", seq=8, ack=1) / Raw(b"GET / HTTP/1.0\r\n\r\n"),
    up / UDP(sport=4251, dport=9) / Raw(b"x" * 60),
    up / ICMP(id=1) / Raw(b"x" * 60),
    gate / UDP(sport=4252, dport=53) / DNS(rd=1, qd=DNSQR(qname="h1.peer.test")),
    eth / IP(src=guest, dst=server, id=77, flags="MF", proto=17) / Raw(b"x" * 64),
    eth / ARP(psrc=guest, hwsrc=mac, pdst=gateway),
    eth / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / BOOTP(chaddr=wire.getsockname()[4]) / DHCP(options=[("message-type", "discover"), "end"]),
]
good = [bytes(frame) for frame in good]
print(send(known), send(mutant(good) for _ in range(mutants)))
