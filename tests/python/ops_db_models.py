"""The ops-db as SQLAlchemy models, by the documentation of `ccat_ops_db`.

    python ops_db_models.py create URL [names|values|text]   tables, one topology, one transfer
    python ops_db_models.py show URL                          the transfer, as SQLAlchemy reads it
    python ops_db_models.py reset URL                         does the same as an operator's reset

`names` are native enum types with member names (SQLAlchemy's default), `values` native types with
values, `text` plain text with a CHECK and values. All of it is an independent reading of public
documentation; none of it is taken from the original.
"""

import enum
import itertools
import json
import sys
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship


class Status(enum.Enum):
    PENDING = "pending"
    SCHEDULED = "scheduled"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class LocationType(enum.Enum):
    SOURCE = "source"
    BUFFER = "buffer"
    LONG_TERM_ARCHIVE = "long_term_archive"
    PROCESSING = "processing"


class StorageType(enum.Enum):
    DISK = "disk"
    S3 = "s3"
    TAPE = "tape"


class RouteType(enum.Enum):
    DIRECT = "direct"
    RELAY = "relay"
    CUSTOM = "custom"


class PackageState(enum.Enum):
    WAITING = "waiting"
    TRANSFERRING = "transferring"
    ARCHIVED = "archived"
    FAILED = "failed"


CONSTRAINT = itertools.count()
LABELS = sys.argv[3] if len(sys.argv) > 3 else "names"


def enum_type(cls):
    if LABELS == "names":
        return sa.Enum(cls)
    values = {"values_callable": lambda members: [member.value for member in members]}
    if LABELS == "values":
        return sa.Enum(cls, **values)
    # Each column has its own constraint, which needs its own name.
    name = f"{cls.__name__.lower()}_{next(CONSTRAINT)}"
    checked = {"native_enum": False, "create_constraint": True, "length": 40, "name": name}
    return sa.Enum(cls, **checked, **values)


class Base(DeclarativeBase):
    pass


class Site(Base):
    __tablename__ = "site"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(250), unique=True)
    short_name: Mapped[str] = mapped_column(sa.String(250))
    location: Mapped[str | None] = mapped_column(sa.String(250))


class DataLocation(Base):
    __tablename__ = "data_location"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(250))
    location_type: Mapped[LocationType] = mapped_column(enum_type(LocationType))
    storage_type: Mapped[StorageType] = mapped_column(enum_type(StorageType))
    priority: Mapped[int] = mapped_column(sa.SmallInteger, default=0)
    site_id: Mapped[int] = mapped_column(sa.ForeignKey("site.id"))
    site: Mapped[Site] = relationship()
    __mapper_args__ = {"polymorphic_on": storage_type}


class DiskDataLocation(DataLocation):
    __tablename__ = "disk_data_location"
    data_location_id: Mapped[int] = mapped_column(
        sa.ForeignKey("data_location.id"), primary_key=True
    )
    host: Mapped[str | None] = mapped_column(sa.String(250))
    path: Mapped[str] = mapped_column(sa.String(250))
    __mapper_args__ = {"polymorphic_identity": StorageType.DISK}


class TapeDataLocation(DataLocation):
    __tablename__ = "tape_data_location"
    data_location_id: Mapped[int] = mapped_column(
        sa.ForeignKey("data_location.id"), primary_key=True
    )
    library: Mapped[str] = mapped_column(sa.String(250))
    __mapper_args__ = {"polymorphic_identity": StorageType.TAPE}


class DataTransferRoute(Base):
    __tablename__ = "data_transfer_route"
    id: Mapped[int] = mapped_column(primary_key=True)
    origin_site_id: Mapped[int] = mapped_column(sa.ForeignKey("site.id"))
    destination_site_id: Mapped[int] = mapped_column(sa.ForeignKey("site.id"))
    method: Mapped[str] = mapped_column(sa.String(250))
    route_type: Mapped[RouteType] = mapped_column(enum_type(RouteType))
    origin_location_id: Mapped[int | None] = mapped_column(sa.ForeignKey("data_location.id"))
    destination_location_id: Mapped[int | None] = mapped_column(sa.ForeignKey("data_location.id"))


class DataTransferPackage(Base):
    __tablename__ = "data_transfer_package"
    id: Mapped[int] = mapped_column(primary_key=True)
    file_name: Mapped[str] = mapped_column(sa.String(250))
    relative_path: Mapped[str] = mapped_column(sa.Text)
    size: Mapped[int | None] = mapped_column(sa.BigInteger)
    checksum: Mapped[str | None] = mapped_column(sa.String(250))
    # A column that only the owner of the schema uses.
    hash_of_headers: Mapped[str | None] = mapped_column(sa.String(250))


class DataTransfer(Base):
    __tablename__ = "data_transfer"
    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    data_transfer_package_id: Mapped[int] = mapped_column(sa.ForeignKey("data_transfer_package.id"))
    origin_location_id: Mapped[int] = mapped_column(sa.ForeignKey("data_location.id"))
    destination_location_id: Mapped[int] = mapped_column(sa.ForeignKey("data_location.id"))
    status: Mapped[Status] = mapped_column(enum_type(Status), default=Status.PENDING)
    unpack_status: Mapped[Status] = mapped_column(enum_type(Status), default=Status.PENDING)
    retry_count: Mapped[int] = mapped_column(default=0)
    # One time with a zone and one without.
    start_time: Mapped[datetime | None] = mapped_column(sa.DateTime)
    end_time: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    failure_error_message: Mapped[str | None] = mapped_column(sa.String(20))
    package: Mapped[DataTransferPackage] = relationship()


class DataTransferLog(Base):
    __tablename__ = "data_transfer_log"
    id: Mapped[int] = mapped_column(primary_key=True)
    data_transfer_id: Mapped[int] = mapped_column(sa.ForeignKey("data_transfer.id"))
    timestamp: Mapped[datetime] = mapped_column(sa.DateTime)
    status: Mapped[Status] = mapped_column(enum_type(Status))
    log_path: Mapped[str] = mapped_column(sa.String(250))


def create(engine):
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        ccat = Site(name="CCAT observatory", short_name="ccat")
        cologne = Site(name="University of Cologne", short_name="cologne")
        origin = DiskDataLocation(
            name="buffer", location_type=LocationType.BUFFER, site=ccat, path="/data"
        )
        destination = DiskDataLocation(
            name="buffer",
            location_type=LocationType.BUFFER,
            site=cologne,
            host="archive.uni-koeln.de",
            path="/buffer",
        )
        tapes = TapeDataLocation(
            name="tapes", location_type=LocationType.LONG_TERM_ARCHIVE, site=cologne, library="TS"
        )
        package = DataTransferPackage(
            file_name="a.tar", relative_path="2026/a.tar", size=50 * 10**9
        )
        session.add_all([origin, destination, tapes, package])
        session.flush()
        session.add(
            DataTransferRoute(
                origin_site_id=ccat.id,
                destination_site_id=cologne.id,
                method="bbcp",
                route_type=RouteType.DIRECT,
            )
        )
        session.add(
            DataTransfer(
                package=package,
                origin_location_id=origin.id,
                destination_location_id=destination.id,
            )
        )
        session.commit()
        session.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        session.commit()


def show(engine):
    with Session(engine) as session:
        transfer = session.scalars(sa.select(DataTransfer)).one()
        logs = session.scalars(sa.select(DataTransferLog)).all()
        now = datetime.now(transfer.end_time.tzinfo) if transfer.end_time else None
        result = {
            "status": transfer.status.name,
            "unpack_status": transfer.unpack_status.name,
            "retry_count": transfer.retry_count,
            "failure_error_message": transfer.failure_error_message,
            "has_start_time": isinstance(transfer.start_time, datetime),
            "has_end_time": isinstance(transfer.end_time, datetime),
            "end_is_not_in_the_future": now is None or now.tzinfo is None or transfer.end_time <= now,
            "logs": [[log.status.name, log.log_path] for log in logs],
        }
    print(json.dumps(result))


def reset(engine):
    with Session(engine) as session:
        transfer = session.scalars(sa.select(DataTransfer)).one()
        transfer.status = Status.PENDING
        session.commit()


if __name__ == "__main__":
    commands = {"create": create, "show": show, "reset": reset}
    commands[sys.argv[1]](sa.create_engine(sys.argv[2]))
