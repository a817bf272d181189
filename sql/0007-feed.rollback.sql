ALTER TABLE balance_changes DROP COLUMN feed_position;

DROP FUNCTION read_feed(bigint, bigint, bigint, bigint);

DROP FUNCTION read_feed_head();

DROP FUNCTION keep_feed_ascending();

DROP FUNCTION feed_offset();

DROP TABLE feed_server;

DROP FUNCTION feed_server_name();
