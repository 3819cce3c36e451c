#!/bin/sh
# Copies the registry, Prefect's database and the bucket of compose.yaml into FOLDER, beside running trainings: deploy/backup.sh FOLDER
# Run again on the same folder it copies only what is new of the bucket.
set -eu
folder=${1:?expected the folder to copy into, found nothing: deploy/backup.sh FOLDER}
mkdir -p "$folder/s3"
folder=$(cd "$folder" && pwd)
# The databases first: every object that they name then is in the copy of the bucket too, unless retention deleted it meanwhile.
for database in mlflow prefect; do
    docker compose exec -T postgres pg_dump --username postgres --format custom "$database" >"$folder/$database.unfinished"
    mv "$folder/$database.unfinished" "$folder/$database.dump"
done
# Objects come and go meanwhile. One that grows is copied as far as it was, and never counts: of a checkpoint the manifest comes last.
docker compose run --rm --no-deps --user "$(id -u):$(id -g)" --volume "$folder:/backup" s3 \
    rclone sync --config /dev/null --local-no-check-updated --ignore-checksum --retries 10 /srv/s3 /backup/s3
echo "backed up into $folder"
