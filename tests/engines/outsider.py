"""
What somebody tries from a machine without a kit, as JSON:

    python outsider.py ports HOST
    python outsider.py calls HOST PORT AUTHORITY      # the file of the authority is no secret
"""

import json
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc


SECONDS = 5.0


def open_ports(host: str) -> list[int]:
    return [port for port in range(1, 2**16) if _answers(host, port)]


def _answers(host: str, port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1.0)
        return tried.connect_ex((host, port)) == 0


def calls(host: str, port: int, authority: str) -> dict[str, str]:
    """What comes of each call: the name of an error, or the bytes that were got."""
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/O=north/CN=north", "-days", "2",
             "-keyout", str(key), "-out", str(certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        own = certificate.read_bytes(), key.read_bytes()
        trusted = Path(authority).read_bytes()
        without, with_own = ssl.create_default_context(cafile=authority), ssl.create_default_context(cafile=authority)
        with_own.load_cert_chain(certificate, key)
        target = f"{host}:{port}"
        tls = grpc.ssl_channel_credentials
        return {
            "plain HTTP": _http(host, port, None),
            "TLS without a certificate": _http(host, port, without),
            "TLS with a certificate of one's own": _http(host, port, with_own),
            "plain gRPC": _grpc(grpc.insecure_channel(target)),
            "gRPC without a certificate": _grpc(grpc.secure_channel(target, tls(trusted))),
            "gRPC with a certificate of one's own": _grpc(grpc.secure_channel(target, tls(trusted, own[1], own[0]))),
        }


def _http(host: str, port: int, context: ssl.SSLContext | None) -> str:
    try:
        with socket.create_connection((host, port), SECONDS) as plain:
            connection = plain if context is None else context.wrap_socket(plain, server_hostname=host)
            connection.settimeout(SECONDS)
            connection.sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if context else b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            return repr(connection.recv(1000))
    except OSError as error:
        return type(error).__name__


def _grpc(channel: grpc.Channel) -> str:
    method = "/communicator.StreamService/Unary"
    try:
        return repr(channel.unary_unary(method)(b"", timeout=SECONDS))
    except grpc.RpcError as error:
        return error.code().name


if __name__ == "__main__":
    what, host, *more = sys.argv[1:]
    found = open_ports(host) if what == "ports" else calls(host, int(more[0]), more[1])
    sys.stdout.write(json.dumps(found))
