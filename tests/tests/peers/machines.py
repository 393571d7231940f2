"""perfdhcp is one relay agent that speaks for many clients. This makes it that many machines on the guest's Ethernet:
every client's frames come from its own hardware address, unrelayed, and what the server says to any of them goes
back to perfdhcp. DHCP's own fields are untouched but for the relay's (hops, giaddr).

    machines.py TAP VETH PERFDHCP-ADDRESS PERFDHCP-PORT
"""

import select
import socket
import struct
import sys


def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(macs, source, destination, ports, payload):
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(payload), 0, 0, 64, 17, 0, source, destination)
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return macs + b"\x08\x00" + header + struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload


def dhcp(frame, port):
    """The payload of an unfragmented datagram without IP options to this port."""
    if frame[12:15] == b"\x08\x00\x45" and frame[23] == 17 and struct.unpack("!H", frame[36:38])[0] == port:
        return frame[42 : 34 + struct.unpack("!H", frame[38:40])[0]]
    return None


tap, veth = (socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) for _ in range(2))
tap.bind((sys.argv[1], 0x0800))
veth.bind((sys.argv[2], 0x0800))
address, port = socket.inet_aton(sys.argv[3]), int(sys.argv[4])
peer = None
everybody, nobody = b"\xff" * 4, b"\0" * 4
print("ready", flush=True)
while True:
    ready, _, _ = select.select([tap, veth], [], [])
    for side in ready:
        frame, origin = side.recvfrom(65535)
        if origin[2] == socket.PACKET_OUTGOING:
            continue
        if side is veth and (asks := dhcp(frame, 67)):
            peer = frame[6:12]
            asks = asks[:3] + b"\0" + asks[4:24] + nobody + asks[28:]
            tap.send(datagram(b"\xff" * 6 + asks[28:34], nobody, everybody, (68, 67), asks))
        elif side is tap and peer and (says := dhcp(frame, 68)):
            veth.send(datagram(peer + b"\x02\0\0\0\0\x43", frame[26:30], address, (67, port), says))
