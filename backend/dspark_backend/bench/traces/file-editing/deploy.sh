#!/bin/sh
# Brings a new release of the site to the server.
set -eu

host=www.garden.example
user=deploy
folder=/srv/garden
keep=5
release=$(date +%Y%m%d%H%M%S)

say() {
  echo "deploy: $1"
}

say "build"
npm ci
npm run build
npm run test

say "pack"
tar czf site.tar.gz build
size=$(wc -c < site.tar.gz)
say "$size bytes"

say "copy"
ssh $user@$host mkdir -p $folder/releases/$release
scp site.tar.gz $user@$host:$folder/releases/$release
rm site.tar.gz

say "unpack"
ssh $user@$host tar xzf $folder/releases/$release/site.tar.gz -C $folder/releases/$release

say "switch"
ssh $user@$host ln -sfn $folder/releases/$release/build $folder/current
ssh $user@$host systemctl reload nginx

say "clean up"
ssh $user@$host "ls -1t $folder/releases | tail -n +$keep | xargs -I name rm -rf $folder/releases/name"

say "check"
curl --fail --silent https://$host/health
say "done"
