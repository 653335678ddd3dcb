-- Claims name the pipelines that a worker has, and how it would run their items.
-- `handling`: 0 normal, 1 few, 2 alone, 3 last attempt.

ALTER TABLE items ADD COLUMN pipeline text COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE items ADD COLUMN handling integer NOT NULL DEFAULT 0;
UPDATE items SET pipeline = runs.name FROM runs WHERE runs.id = items.run_id;
DROP INDEX items_ready;
CREATE INDEX items_ready ON items (pipeline, handling, tenant, priority, id)
    WHERE status = 'pending' AND not_before IS NULL;
