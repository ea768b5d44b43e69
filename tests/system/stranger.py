"""A stranger: connects to every address that it reads from stdin, again and again, and says what it got.

python stranger.py [--once] < lines of "ADDRESS PORT". At the end of its input it prints {"connected": ..., "received":
...}.
"""

import json
import os
import resource
import select
import socket
import struct
import sys

# Nothing at all, half of a number, noise, zeros, a request to torch's store, and the numbers by which gloo knows peers.
WORDS = [
    b"", struct.pack("q", 1)[:4], os.urandom(4096), bytes(4096), b"GET / HTTP/1.1\r\n\r\n",
    *(struct.pack("q", number) for number in range(8)), *(struct.pack("q", number) + bytes(64) for number in range(4)),
]  # fmt: skip
GUESSES = [struct.pack("q", number) for number in range(8)]
MOST = 800


def attack(target: tuple[str, int], words: list[bytes], held: list[socket.socket]) -> None:
    for word in words:
        peer = socket.socket()
        peer.settimeout(0.02)
        try:
            peer.connect(target)
            peer.sendall(word)
        except OSError:
            peer.close()
            continue
        peer.setblocking(False)
        held.append(peer)


def received(peer: socket.socket) -> int:
    total = 0
    try:
        while data := peer.recv(65536):
            total += len(data)
    except OSError:
        pass
    return total


def main() -> None:
    once = "--once" in sys.argv
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held: list[socket.socket] = []
    targets: list[tuple[str, int]] = []
    connected = total = 0
    while True:
        while select.select([sys.stdin], [], [], 0.005)[0]:
            line = sys.stdin.readline()
            if not line:
                total += sum(received(peer) for peer in held)
                print(json.dumps({"connected": connected + len(held), "received": total}))
                return
            address, port = line.split()
            targets.append((address, int(port)))
            if once:
                attack(targets.pop(), GUESSES, held)
        for target in targets:
            attack(target, WORDS, held)
        while len(held) > MOST:
            peer = held.pop(0)
            connected, total = connected + 1, total + received(peer)
            peer.close()


if __name__ == "__main__":
    main()
