-- See to it that the positions which this server gives are above all that were ever given; gives whether it is a standby, which gives
-- none. sql/0011-feed-of-a-copy.sql has the function.
SELECT pg_is_in_recovery() FROM {schema}keep_feed_ascending()
