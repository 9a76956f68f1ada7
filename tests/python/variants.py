"""Deployments of other kinds: their database in PostgreSQL, their bbcp the real one over ssh."""

import json
import os
import uuid
from pathlib import Path

import psycopg
import sqlalchemy as sa
from psycopg.rows import dict_row

from support import Deployment, service


class OwnBbcp(Deployment):
    """Has its own copy of bbcp, to distinguish its processes from those of other deployments at the same time."""

    # Factor for the time limits of the tests.
    patience = 1

    def __init__(self, directory, bbcp, broker):
        super().__init__(directory, bbcp, broker)
        self.program.unlink()
        os.link(bbcp, self.program)
        self.bbcp = self.program.resolve()


class OnPostgres(OwnBbcp):
    """The database is in the private PostgreSQL."""

    def __init__(self, directory, bbcp, broker):
        self.server = sa.make_url(service("TEST_POSTGRES_URL"))
        self.database_name = f"test_{uuid.uuid4().hex}"
        # Address for the workers; a test can insert a proxy.
        self.database_port = self.server.port
        self._administer(f"CREATE DATABASE {self.database_name}")
        self.connection = self._connect(self.database_name)
        super().__init__(directory, bbcp, broker)

    def _connect(self, database):
        return psycopg.connect(
            host=self.server.host,
            port=self.server.port,
            user=self.server.username,
            dbname=database,
            autocommit=True,
            row_factory=dict_row,
        )

    def _administer(self, statement):
        with self._connect("postgres") as connection:
            connection.execute(statement)

    def ops_db(self):
        return {
            "database_type": "postgresql",
            "database_postgresql_database": self.database_name,
            "database_postgresql_user": self.server.username,
            "database_postgresql_host": self.server.host,
            "database_postgresql_port": self.database_port,
            "max_connections": 4,
        }

    def execute(self, sql, *values):
        self.connection.execute(sql.replace("?", "%s"), values)

    def rows(self, sql, *values):
        return self.connection.execute(sql.replace("?", "%s"), values).fetchall()

    def close(self):
        super().close()
        self.connection.close()
        self._administer(f"DROP DATABASE IF EXISTS {self.database_name} WITH (FORCE)")


def ssh_settings():
    """Settings to reach the private sshd."""
    return {
        "port": int(service("TEST_SSHD_PORT")),
        "identity_file": service("TEST_SSH_IDENTITY"),
        "known_hosts_file": service("TEST_SSH_KNOWN_HOSTS"),
        "user": service("TEST_SSH_USER"),
        "max_package_bytes": 0,
    }


class RealBbcp(OwnBbcp):
    """A real bbcp that pushes over the private sshd."""

    # Every check of the other end is a login.
    patience = 6

    def __init__(self, directory, broker):
        super().__init__(directory, os.environ["BBCP_REAL"], broker)
        self.execute(
            "UPDATE disk_data_location SET host = '127.0.0.1' WHERE data_location_id ="
            " (SELECT l.id FROM data_location l JOIN site s ON s.id = l.site_id WHERE s.short_name = ?)",
            self.destination_site,
        )

    def settings(self, backend="redis", **sections):
        sections["ssh"] = ssh_settings() | sections.get("ssh", {})
        sections["bbcp"] = {"remote_program": str(self.program)} | sections.get("bbcp", {})
        super().settings(backend, **sections)

    def double(self, **knobs):
        """The real bbcp has only one option of the double: the rate."""
        if "RATE" in knobs:
            self.settings(bbcp={"max_rate": f"{knobs['RATE'] // 1024}k"})

    def copies(self):
        """The real bbcp keeps no record of its copies."""
        return []
