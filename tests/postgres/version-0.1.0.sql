-- A database of version 0.1.0, as its service made it: changes with and without keys, refusals, overdrafts, a batch, the greatest balance.
CREATE TABLE public._yoyo_log (
    id character varying(36) NOT NULL,
    migration_hash character varying(64),
    migration_id character varying(255),
    operation character varying(10),
    username character varying(255),
    hostname character varying(255),
    comment character varying(255),
    created_at_utc timestamp without time zone
);
CREATE TABLE public._yoyo_migration (
    migration_hash character varying(64) NOT NULL,
    migration_id character varying(255),
    applied_at_utc timestamp without time zone
);
CREATE TABLE public._yoyo_version (
    version integer NOT NULL,
    installed_at_utc timestamp without time zone
);
CREATE TABLE public.balance_changes (
    user_id bigint NOT NULL,
    version bigint,
    amount bigint NOT NULL,
    balance bigint NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    idempotency_key text NOT NULL COLLATE pg_catalog."C",
    reference text,
    refusal text,
    CONSTRAINT balance_changes_refusal_known CHECK ((refusal = ANY (ARRAY['insufficient_funds'::text, 'balance_limit_exceeded'::text]))),
    CONSTRAINT balance_changes_version_unless_refused CHECK (((version IS NULL) = (refusal IS NOT NULL)))
);
COMMENT ON COLUMN public.balance_changes.version IS 'which change of the account it was, from 1 without a gap; null if refused';
COMMENT ON COLUMN public.balance_changes.balance IS 'the balance after the change; if refused, the one that could not cover it';
COMMENT ON COLUMN public.balance_changes.idempotency_key IS 'the caller''s, or one that the service made, which begins with a space';
CREATE TABLE public.users (
    id bigint NOT NULL,
    balance bigint NOT NULL,
    opening_balance bigint NOT NULL,
    version bigint DEFAULT 0 NOT NULL,
    minimum_balance bigint DEFAULT 0 NOT NULL,
    opening_minimum_balance bigint DEFAULT 0 NOT NULL,
    CONSTRAINT users_balance_at_least_minimum CHECK ((balance >= minimum_balance)),
    CONSTRAINT users_balance_within_limit CHECK ((balance <= '9007199254740991'::bigint)),
    CONSTRAINT users_id_in_range CHECK (((id >= 1) AND (id <= '9007199254740991'::bigint))),
    CONSTRAINT users_minimum_balance_in_range CHECK (((minimum_balance >= '-9007199254740991'::bigint) AND (minimum_balance <= '9007199254740991'::bigint))),
    CONSTRAINT users_version_not_negative CHECK ((version >= 0))
)
WITH (fillfactor='50');
CREATE TABLE public.yoyo_lock (
    locked integer DEFAULT 1 NOT NULL,
    ctime timestamp without time zone,
    pid integer NOT NULL
);
INSERT INTO public._yoyo_log VALUES ('cfc57160-e9f2-11f1-a2c8-02fc00000001', '71acae6ca3b68d1d9bd2b056a052aa3c5824a0ad1ce3c620a966bd0f22e50dfb', '0001-users', 'apply', '', '', NULL, '2026-11-26 23:40:50.238443');
INSERT INTO public._yoyo_log VALUES ('cfc986f6-e9f2-11f1-a2c8-02fc00000001', '83dd0602e21d6bcbb943e4ecad29aef203380d774178dc0daf5753478f258929', '0002-journal', 'apply', '', '', NULL, '2026-11-26 23:40:50.264586');
INSERT INTO public._yoyo_migration VALUES ('71acae6ca3b68d1d9bd2b056a052aa3c5824a0ad1ce3c620a966bd0f22e50dfb', '0001-users', '2026-11-26 23:40:50.240039');
INSERT INTO public._yoyo_migration VALUES ('83dd0602e21d6bcbb943e4ecad29aef203380d774178dc0daf5753478f258929', '0002-journal', '2026-11-26 23:40:50.275669');
INSERT INTO public._yoyo_version VALUES (2, '2026-11-26 23:40:50.175422');
INSERT INTO public.balance_changes VALUES (1, 1, -30, 70, '2026-11-26 23:40:53.248812+00', 'order-1', 'a book', NULL);
INSERT INTO public.balance_changes VALUES (1, NULL, -300, 70, '2026-11-26 23:40:53.26464+00', 'order-2', NULL, 'insufficient_funds');
INSERT INTO public.balance_changes VALUES (1, 2, 5, 75, '2026-11-26 23:40:53.27843+00', ' eacaf6d4c25b7b8ba5e8f772e50a934e-000000000002', NULL, NULL);
INSERT INTO public.balance_changes VALUES (5, 1, -50, -50, '2026-11-26 23:40:53.300556+00', 'overdraft', NULL, NULL);
INSERT INTO public.balance_changes VALUES (5, NULL, -1, -50, '2026-11-26 23:40:53.357423+00', 'too-deep', NULL, 'insufficient_funds');
INSERT INTO public.balance_changes VALUES (9007199254740991, NULL, 1, 9007199254740991, '2026-11-26 23:40:53.403436+00', 'too-much', NULL, 'balance_limit_exceeded');
INSERT INTO public.balance_changes VALUES (2, 1, -1, 199, '2026-11-26 23:40:53.437157+00', 'b-1', NULL, NULL);
INSERT INTO public.balance_changes VALUES (2, 2, 7, 206, '2026-11-26 23:40:53.437199+00', ' eacaf6d4c25b7b8ba5e8f772e50a934e-000000000009', NULL, NULL);
INSERT INTO public.balance_changes VALUES (3, 1, -2, 298, '2026-11-26 23:40:53.437211+00', ' eacaf6d4c25b7b8ba5e8f772e50a934e-000000000007', NULL, NULL);
INSERT INTO public.balance_changes VALUES (4, NULL, -999, 400, '2026-11-26 23:40:53.44388+00', 'b-2', NULL, 'insufficient_funds');
INSERT INTO public.balance_changes VALUES (3, 2, -310, -12, '2026-11-26 23:40:53.515379+00', 'after', NULL, NULL);
INSERT INTO public.users VALUES (4, 400, 400, 0, 0, 0);
INSERT INTO public.users VALUES (9007199254740991, 9007199254740991, 9007199254740991, 0, 0, 0);
INSERT INTO public.users VALUES (1, 75, 100, 2, 0, 0);
INSERT INTO public.users VALUES (5, -50, 0, 1, -50, -50);
INSERT INTO public.users VALUES (2, 206, 200, 2, 0, 0);
INSERT INTO public.users VALUES (3, -12, 300, 2, -20, 0);
ALTER TABLE ONLY public._yoyo_log
    ADD CONSTRAINT _yoyo_log_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public._yoyo_migration
    ADD CONSTRAINT _yoyo_migration_pkey PRIMARY KEY (migration_hash);
ALTER TABLE ONLY public._yoyo_version
    ADD CONSTRAINT _yoyo_version_pkey PRIMARY KEY (version);
ALTER TABLE ONLY public.balance_changes
    ADD CONSTRAINT balance_changes_pkey PRIMARY KEY (user_id, idempotency_key);
ALTER TABLE ONLY public.balance_changes
    ADD CONSTRAINT balance_changes_version_key UNIQUE (user_id, version);
ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.yoyo_lock
    ADD CONSTRAINT yoyo_lock_pkey PRIMARY KEY (locked);
