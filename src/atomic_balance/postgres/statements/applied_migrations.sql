-- List the migrations that yoyo has applied.
SELECT migration_id
  FROM {schema}_yoyo_migration
