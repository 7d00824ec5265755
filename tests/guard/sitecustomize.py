"""Refuses every connection that would leave this machine and writes down who tried; Python imports it from PYTHONPATH."""
import ipaddress
import os
import socket
import sys

LOCAL = {None, "", b"", "localhost", "ip6-localhost", socket.gethostname()}


def leaves(host) -> bool:
    "Tell whether a host name or address is another machine's."
    if host in LOCAL:
        return False
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return True
    return not (address.is_loopback or address.is_unspecified)


def guarded(function, host_of):
    "Return a function that refuses to talk to other machines."
    def call(*arguments, **named):
        host = host_of(arguments)
        if leaves(host):
            with open(os.environ.get("NETWORK_GUARD", os.devnull), "a") as file:
                file.write(f"{host} {' '.join(sys.argv)[:200]}\n")
            raise OSError(f"a test refuses to connect to {host}")
        return function(*arguments, **named)
    return call


def host_of_socket(arguments):
    "The host of (socket, address); Unix sockets have none."
    return arguments[-1][0] if isinstance(arguments[-1], tuple) else None


for method in ("connect", "connect_ex"):
    setattr(socket.socket, method, guarded(getattr(socket.socket, method), host_of_socket))
socket.getaddrinfo = guarded(socket.getaddrinfo, lambda arguments: arguments[0])
