-- See to it that the positions which this server gives are above all that were ever given. sql/0007-feed.sql has the function.
SELECT FROM {schema}keep_feed_ascending()
