# Runs as root of mmdebstrap's namespace (or of fakechroot) when all packages are configured. The variables at its top and
# the files between were written by script.rs. $1 is the root; standard input is the image's file, open for writing.

# The build's own traces.
rm -f "$root/etc/apt/apt.conf.d/00mmdebstrap" "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
rm -f "$root/etc/ssh/ssh_host_"* "$root/var/lib/dbus/machine-id" "$root/etc/resolv.conf"
: >"$root/etc/machine-id"
ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

inside systemctl --quiet enable systemd-networkd.service systemd-resolved.service ssh.service pontoon-host-keys.service
chown 0:0 "$root/usr/sbin/pontoon-agent"
chmod 755 "$root/usr/sbin/pontoon-agent"
# Work in the background that a machine of some minutes or hours has no use for.
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service; do
    inside systemctl --quiet disable "$unit" 2>/dev/null || true
done

# What it is made of, with the SHA-256 that the archive's signed index tells.
inside dpkg-query --show --showformat='${Package}=${Version}\n' >"$root/run/pontoon-packages"
inside sh -c 'xargs apt-cache show </run/pontoon-packages' | awk '
    /^Package: / { name = $2 } /^Version: / { version = $2 } /^SHA256: / { sum = $2 }
    /^$/ { if (name) print "pontoon-package", name, version, (sum ? sum : "-"); name = version = sum = "" }
    END { if (name) print "pontoon-package", name, version, (sum ? sum : "-") }'

rm -rf "$root/var/lib/apt/lists/"* "$root/var/cache/apt/"*.bin "$root/var/cache/apt/archives/"*.deb "$root/var/cache/debconf/"*-old
rm -rf "$root/var/log/apt/"* "$root/var/log/dpkg.log" "$root/var/log/alternatives.log" "$root/var/log/bootstrap.log"
rm -rf "$root/var/cache/ldconfig/aux-cache" "$root/tmp/"* "$root/run/pontoon-packages"

# The tree without what is mounted in it. Where nothing can be mounted, nothing is.
tree=$root
if mount --bind "$root" "$root/mnt" 2>/dev/null; then
    tree=$root/mnt
fi
status=0
mke2fs -q -F -t ext4 -L debian -U "$uuid" -E root_owner=0:0,lazy_itable_init=0 -d "$tree" /proc/self/fd/0 >&2 || status=$?
if [ "$tree" != "$root" ]; then
    umount "$root/mnt"
fi
exit $status
