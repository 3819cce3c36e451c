#!/bin/sh
# Copies the registry, Prefect's database and the bucket of compose.yaml into FOLDER, beside running trainings: deploy/backup.sh FOLDER
# Run again on the same folder it copies only what is new of the bucket. What that replaces or deletes in the copy, and the dumps of before, go
# to FOLDER/replaced/TIME: a loss that nobody has noticed yet must not reach the backup, too.
set -eu
folder=${1:?expected the folder to copy into, found nothing: deploy/backup.sh FOLDER}
mkdir -p "$folder/s3"
folder=$(cd "$folder" && pwd)
replaced=replaced/$(date -u +%Y%m%dT%H%M%SZ)
in_s3() {
    docker compose run --rm --no-deps --user "$(id -u):$(id -g)" --volume "$folder:/backup" s3 "$@"
}
if [ -n "$(find "$folder/s3" -type f | head -n 1)" ] && [ -z "$(in_s3 find /srv/s3 -type f | head -n 1)" ]; then
    echo "the store is empty and its copy in $folder is not: nothing was copied; deploy/restore.sh $folder bucket brings it back, another folder begins anew" >&2
    exit 1
fi
# The databases first: every object that they name then is in the copy of the bucket too, unless retention deleted it meanwhile.
for database in mlflow prefect; do
    docker compose exec -T postgres pg_dump --username postgres --format custom "$database" >"$folder/$database.unfinished"
    if [ -e "$folder/$database.dump" ]; then
        mkdir -p "$folder/$replaced"
        mv "$folder/$database.dump" "$folder/$replaced/$database.dump"
    fi
    mv "$folder/$database.unfinished" "$folder/$database.dump"
done
# Objects come and go meanwhile. One that grows is copied as far as it was, and never counts: of a checkpoint the manifest comes last.
in_s3 rclone sync --config /dev/null --local-no-check-updated --ignore-checksum --retries 10 --backup-dir "/backup/$replaced/s3" /srv/s3 /backup/s3
echo "backed up into $folder"
