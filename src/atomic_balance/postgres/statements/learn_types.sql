-- Have asyncpg look up the types that statements use as a connection is opened: on a cluster it takes a while.
SELECT NULL::bigint[], NULL::integer[], NULL::text[], NULL::boolean[]
