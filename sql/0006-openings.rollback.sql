ALTER TABLE users DROP COLUMN opened_at;
