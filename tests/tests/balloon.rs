//! Memory that a stock guest has freed comes back to its host.

use pontoon_tests::{debian_image, shell_beside_image, text};

/// Runs on the emulated host: a guest fills 90 MiB and frees them; the pages of the machine's memory are counted until they are
/// 40 MiB fewer than they were, for at most two minutes. Linux reports free blocks of 2 MiB and more: what it has in smaller pieces stays.
const SCRIPT: &str = r#"
pontoon run debian --accel kvm --memory 512M --net none --timeout 170 -- \
    sh -c 'dd if=/dev/zero of=/full bs=1M count=90; rm /full; echo freed; sleep 160' >/lab/console 2>&1 &
pid=$!
high=0 now=0 n=0
while [ $n -lt 120 ]; do
    for fd in /proc/$pid/fd/*; do
        case $(readlink $fd) in *guest-ram*) now=$(($(stat -L -c %b $fd) / 2048));; esac
    done
    [ $now -gt $high ] && high=$now
    if [ $high -gt 90 ] && [ $((high - now)) -gt 40 ]; then
        echo "fell from $high to $now MiB"
        kill $pid
        exit 0
    fi
    sleep 1
    n=$((n + 1))
done
echo "stayed at $now MiB of $high"
cat /lab/console
exit 1
"#;

#[test]
fn a_guest_that_frees_memory_gives_it_back_to_the_host() {
    let Some(image) = debian_image() else { return };
    let output = shell_beside_image(&image, SCRIPT);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
}
