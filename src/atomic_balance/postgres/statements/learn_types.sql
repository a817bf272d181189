-- Have asyncpg look up the types that statements use as a connection is opened, and not when a change waits.
SELECT NULL::bigint[], NULL::integer[], NULL::text[], NULL::boolean[]
