-- transactional: false

DROP INDEX CONCURRENTLY balance_changes_before_feed;

DROP INDEX CONCURRENTLY balance_changes_feed;
