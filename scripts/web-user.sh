#!/usr/bin/env bash
# web-user.sh DATABASE USER: creates (or updates) a user of PostgreSQL for `ccat-transfer web`, which may only read the tables that
# the status page shows. Run it as a user who may create roles and grant on these tables; psql takes the server from PGHOST, PGPORT,
# PGUSER and PGPASSWORD. The password of the new user is read from WEB_PASSWORD; without it, the user has none (for certificates,
# or `peer` in pg_hba.conf). Run it again after `ccat-transfer db migrate` has created tables.
set -euo pipefail

[[ $# == 2 ]] || { echo "usage: $0 DATABASE USER" >&2; exit 2; }
database=$1 user=$2

psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --dbname="$database" \
  --set=database="$database" --set=user="$user" <<'SQL'
-- Not on the command line, which other users can see.
\set password `printenv WEB_PASSWORD`
SELECT format('CREATE ROLE %I LOGIN', :'user') WHERE to_regrole(quote_ident(:'user')) IS NULL \gexec
SELECT format('ALTER ROLE %I PASSWORD %L', :'user', :'password') WHERE :'password' <> '' \gexec
SELECT format('ALTER ROLE %I SET default_transaction_read_only = on', :'user') \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', :'database', :'user') \gexec
SELECT format('GRANT USAGE ON SCHEMA %I TO %I', n.nspname, :'user')
  FROM pg_namespace n WHERE n.nspname = (SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = 'data_transfer'::regclass) \gexec
SELECT format('GRANT SELECT ON %s TO %I', c.oid::regclass, :'user')
  FROM pg_class c
 WHERE c.relkind IN ('r', 'p', 'v') AND pg_table_is_visible(c.oid)
   AND (c.relname LIKE 'transfer\_worker\_%'
     OR c.relname IN ('site', 'data_location', 'disk_data_location', 'data_transfer_route', 'data_transfer_package',
                      'data_transfer', 'data_transfer_log')) \gexec
SQL
echo "$user may read the tables of the status page in $database"
