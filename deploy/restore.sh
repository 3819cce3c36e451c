#!/bin/sh
# Brings back what was lost, from a folder that deploy/backup.sh made: deploy/restore.sh FOLDER mlflow|prefect|bucket
# Only what is named; a newer copy of the other side stays as it is. docs/operations.md tells what trainings do then.
set -eu
folder=${1:?expected a folder that deploy/backup.sh made, found nothing: deploy/restore.sh FOLDER mlflow|prefect|bucket}
what=${2:-nothing}
[ -e "$folder/mlflow.dump" ] || { echo "$folder: expected a folder that deploy/backup.sh made, found no mlflow.dump in it" >&2; exit 2; }
folder=$(cd "$folder" && pwd)
case $what in
mlflow | prefect)
    docker compose exec -T postgres pg_restore --list <"$folder/$what.dump" >/dev/null || {
        echo "$folder/$what.dump: expected a dump that pg_restore can read; nothing was changed. Older ones are in $folder/replaced" >&2
        exit 2
    }
    docker compose stop worker "$what"
    # Beside the one that is there, which goes only when the other is whole.
    docker compose exec -T postgres dropdb --username postgres --if-exists --force "restored_$what"
    docker compose exec -T postgres createdb --username postgres "restored_$what"
    docker compose exec -T postgres pg_restore --username postgres --exit-on-error --dbname "restored_$what" <"$folder/$what.dump"
    docker compose exec -T postgres dropdb --username postgres --if-exists --force "$what"
    docker compose exec -T postgres psql --username postgres --quiet --command "ALTER DATABASE restored_$what RENAME TO $what"
    ;;
bucket)
    [ -n "$(find "$folder/s3" -type f | head -n 1)" ] || {
        echo "$folder/s3: expected the copy of a store, found no object in it; nothing was changed. What was deleted is in $folder/replaced" >&2
        exit 2
    }
    in_s3() {
        docker compose run --rm --no-deps --volume "$folder:/backup" s3 "$@"
    }
    # Not this script reads the copy, but the user of the image.
    in_s3 sh -c '[ -z "$(find /backup/s3 ! -readable 2>&1 | head -n 1)" ]' || {
        echo "$folder/s3: expected a copy that the container may read, found files or folders that it may not; nothing was changed: chmod -R a+rX $folder" >&2
        exit 2
    }
    # rclone remembers what its folders held.
    docker compose stop worker s3
    # Not sync, which would delete what is newer than the backup, and not over what is newer: the copy may have been made while that still grew.
    in_s3 rclone copy --config /dev/null --update /backup/s3 /srv/s3
    ;;
*)
    echo "expected mlflow, prefect or bucket, found $what: deploy/restore.sh FOLDER mlflow|prefect|bucket" >&2
    exit 2
    ;;
esac
docker compose up --detach --wait
echo "restored $what from $folder"
