# Sourced by the measurements beside it: three namespaces of their own, guest ── stack ── host ── world, the load, and what
# the stack has used.
# shellcheck shell=bash
#
#   guest 192.168.122.2      what is behind the stack; made by guest_up for each contender
#   host 10.99.0.1           where the stack runs
#   world 10.99.0.2          servers: iperf3 on 5201, netload on 7100
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

[ "$(id -u)" -eq 0 ] || die "run it as root: it makes network namespaces"
need ip iproute2 nft nftables iperf3 iperf3 python3 python3
pontoon=${PONTOON:-}
[ -n "$pontoon" ] || build_pontoon
step "the load: tests/examples/netload.rs"
need_rust
(cd "$top" && cargo build --release --locked --quiet -p pontoon-tests --example netload) >&2
netload=${CARGO_TARGET_DIR:-$top/target}/x86_64-unknown-linux-gnu/release/examples/netload
# Each connection is a descriptor on either side.
ulimit -n "$(ulimit -Hn)"

guest=pbg$$ host=pbh$$ world=pbw$$
results=$(mktemp)
pids=()
servers=()
stack= # the process whose time and memory count
stop() {
    stack=
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    pids=()
}
guest_down() {
    stop
    ip netns exec "$host" nft flush ruleset 2>/dev/null || true
    ip -n "$host" link del br0 2>/dev/null || true
    ip netns del "$guest" 2>/dev/null || true
}
cleanup() {
    guest_down
    [ ${#servers[@]} -eq 0 ] || kill "${servers[@]}" 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
    ip netns del "$world" 2>/dev/null || true
    rm -f "$results"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

for ns in "$host" "$world"; do
    ip netns add "$ns"
    ip -n "$ns" link set lo up
    ip netns exec "$ns" sysctl -qw net.ipv4.ip_local_port_range="10000 65000" net.ipv4.tcp_max_syn_backlog=8192 \
        net.ipv4.ping_group_range="0 2147483647"
done
# Thousands of connections a second: what has ended on the world's side is forgotten.
ip netns exec "$world" sysctl -qw net.ipv4.tcp_max_tw_buckets=0
ip -n "$host" link add h0 type veth peer name w0 netns "$world"
ip -n "$host" addr add 10.99.0.1/24 dev h0
ip -n "$world" addr add 10.99.0.2/24 dev w0
ip -n "$host" link set h0 up
ip -n "$world" link set w0 up
ip -n "$host" route add default via 10.99.0.2
ip netns exec "$world" iperf3 -s >/dev/null 2>&1 &
servers+=($!)
ip netns exec "$world" "$netload" serve 7100 &
servers+=($!)

guest_up() {
    ip netns add "$guest"
    ip -n "$guest" link set lo up
    ip netns exec "$guest" sysctl -qw net.ipv4.ip_local_port_range="10000 65000"
    ip netns exec "$guest" iperf3 -s -p 5202 >/dev/null 2>&1 &
    pids+=($!)
}

# until_ok COMMAND…: tries it for at most ten seconds.
until_ok() {
    for _ in $(seq 100); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    die "no connection: $*"
}
reaches() { ip netns exec "$guest" timeout 1 bash -c 'exec 3<>/dev/tcp/10.99.0.2/5201'; }
in_guest() { [ "$(readlink "/proc/$1/ns/net")" = "net:[$(stat -Lc %i "/run/netns/$guest")]" ]; }
address() {
    ip -n "$guest" link set "$1" up
    ip -n "$guest" addr add 192.168.122.2/24 dev "$1"
    ip -n "$guest" route add default via 192.168.122.1
}

# start_pontoon [ARGUMENTS…]: what follows goes to `net attach`.
start_pontoon() {
    ip netns exec "$guest" sleep 3600 &
    pids+=($!)
    local inside=$!
    until_ok in_guest "$inside"
    ip netns exec "$host" "$pontoon" net attach --pid "$inside" --tap tap0 --subnet 192.168.122.0/24 \
        -p 0.0.0.0:5202:5202 "$@" >/dev/null &
    stack=$!
    pids+=("$stack")
    until_ok ip -n "$guest" link show dev tap0
    address tap0
}

ticks=$(getconf CLK_TCK)
# Clock ticks that the stack has used, user and system.
used() { [ -z "$stack" ] || awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$stack/stat"; }
# Megabytes of the stack in memory.
rss() { awk '/^VmRSS/ { print $2 / 1024 }' "/proc/$stack/status"; }

# hold_up COUNT: connections that say nothing, until hold_down. Says whether all of them were opened.
hold_up() {
    coproc holder { exec ip netns exec "$guest" "$netload" hold 10.99.0.2 7100 "$1" 2>&1; }
    holding=$holder_PID
    local line
    read -t 40 -r line <&"${holder[0]}" || line="no answer in 40 s"
    [[ $line == "held=$1 "* ]] || { say "no figure: $line"; return 1; }
    sleep 1
}
hold_down() {
    kill "$holding" 2>/dev/null || true
    wait "$holding" 2>/dev/null || true
}
