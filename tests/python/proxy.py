"""A TCP proxy in front of a server, to cut the connections of its clients."""

import contextlib
import selectors
import socket
import threading


class Proxy:
    """Forwards connections to `port`. `pull` ends the forwarding, `plug` resumes it."""

    def __init__(self, host, port):
        self.server = (host, port)
        self.port = 0
        self.connections = []
        self.lock = threading.Lock()
        self.silent = False
        self.listener = None
        self.lost = (b"", b"", 0)
        self.losses = 0
        self.plug()

    def plug(self):
        """Starts to forward new connections."""
        self.silent = False
        # Connections that were cut silently are reset now.
        self._close_connections()
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self.listener.getsockname()[1]
            threading.Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def pull(self, silently=False):
        """Cuts like a server that ends: connections are reset and refused. Or silently, like a firewall or a dead switch:
        no data pass any more, and no connection is closed."""
        self.silent = silently
        if not silently:
            self.close()

    def close(self):
        if self.listener is not None:
            # Otherwise the accepting thread keeps the socket open.
            with contextlib.suppress(OSError):
                self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
        self._close_connections()

    def lose_replies(self, request, reply, count):
        """The next `count` times, a connection ends instead of forwarding a reply that contains `reply`, if an earlier
        request of the connection contains `request`. `losses` counts them."""
        self.lost = (request, reply, count)

    def _close_connections(self):
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=[client], daemon=True).start()

    def _forward(self, client):
        with client, contextlib.suppress(OSError), socket.create_connection(self.server) as server:
            with self.lock:
                self.connections += [client, server]
            with selectors.DefaultSelector() as ready:
                ready.register(client, selectors.EVENT_READ, server)
                ready.register(server, selectors.EVENT_READ, client)
                is_marked = False
                while True:
                    for key, _ in ready.select():
                        data = key.fileobj.recv(65536)
                        if not data:
                            return
                        request, reply, count = self.lost
                        if self.losses < count and key.fileobj is client:
                            is_marked = is_marked or request in data
                        elif is_marked and self.losses < count and reply in data:
                            self.losses += 1
                            return
                        if not self.silent:
                            key.data.sendall(data)
