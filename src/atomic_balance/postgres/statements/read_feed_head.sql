-- Read how far the feed goes, and how far behind it is. sql/0007-feed.sql has the function.
SELECT head, lag_seconds FROM {schema}read_feed_head()
