-- What the feed reads by: all rows by their position, and those from before the feed by user and version.
-- Made beside changes that go on, which may take long for a long journal; what an interrupted try left behind is removed first.
-- depends: 0007-feed
-- transactional: false

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_class WHERE oid = 'balance_changes'::regclass AND relkind = 'p') THEN
        RAISE EXCEPTION 'the journal is partitioned: make the feed''s indexes, as docs/scaling.md says, and then: yoyo mark -r 0008-feed-index';
    END IF;
END
$$;

DROP INDEX CONCURRENTLY IF EXISTS balance_changes_feed;

CREATE INDEX CONCURRENTLY balance_changes_feed ON balance_changes (feed_position) WHERE version IS NOT NULL;

DROP INDEX CONCURRENTLY IF EXISTS balance_changes_before_feed;

CREATE INDEX CONCURRENTLY balance_changes_before_feed ON balance_changes (user_id, version) WHERE feed_position = 0 AND version IS NOT NULL;
