#!/bin/sh
# Runs once, when the database is created: esper_owner owns the tables, esper uses them. The owner of a
# table can drop its triggers; the application therefore owns none, and only adds to the audit log. What
# esper_compile may do, grant_compile_role says after each migration.
set -eu
owner_password="$(cat "${DATABASE_OWNER_PASSWORD_FILE:-/run/secrets/database_owner_password}")"
password="$(cat "${DATABASE_PASSWORD_FILE:-/run/secrets/database_password}")"
compile_password="$(cat "${COMPILE_DATABASE_PASSWORD_FILE:-/run/secrets/compile_database_password}")"
psql --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres \
  --set owner_password="$owner_password" --set password="$password" \
  --set compile_password="$compile_password" <<'SQL'
CREATE ROLE esper_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE esper LOGIN PASSWORD :'password';
CREATE ROLE esper_compile LOGIN PASSWORD :'compile_password';
CREATE DATABASE esper OWNER esper_owner;
REVOKE ALL ON DATABASE esper FROM PUBLIC;
GRANT CONNECT ON DATABASE esper TO esper, esper_compile;
\connect esper
ALTER SCHEMA public OWNER TO esper_owner;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
SQL
