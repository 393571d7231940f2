//! Dialogues with the server. `dhcproto` plays the other side, so bytes are checked by a second implementation.

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode};
use dhcproto::{Decodable, Encodable};
use proptest::prelude::*;

use super::pool::{MAX_PER_MAC, OFFER_HOLD, QUARANTINE};
use super::*;
use crate::nat::config::Reservation;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);

fn mac(n: u16) -> MacAddr {
    let [a, b] = n.to_be_bytes();
    MacAddr([0x52, 0x54, 0, 0, a, b])
}

fn addr(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 122, n)
}

/// A message from the machine `mac(n)`.
fn message(n: u16, kind: MessageType, options: Vec<DhcpOption>) -> Message {
    let zero = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(0x1234_5678, zero, zero, zero, zero, &mac(n).octets());
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option);
    }
    message
}

struct Dialogue {
    server: Server,
    now: Instant,
}

impl Dialogue {
    fn new() -> Self {
        Self::with(NatConfig::default())
    }

    fn with(config: NatConfig) -> Self {
        Self { server: Server::new(Config::new(&config)), now: Instant::now() }
    }

    fn small(guests: u8) -> Self {
        let mut config = Config::new(&NatConfig::default());
        config.pool.1 = addr(1 + guests);
        Self { server: Server::new(config), now: Instant::now() }
    }

    fn wait(&mut self, secs: u64) {
        self.now += Duration::from_secs(secs);
    }

    fn tell(&mut self, message: &Message) -> Result<Outcome, DropReason> {
        let source = MacAddr(message.chaddr().try_into().unwrap());
        self.server.input(&message.to_vec().unwrap(), source, self.now)
    }

    fn ask(&mut self, message: &Message) -> (Reply, Message) {
        match self.tell(message) {
            Ok(Outcome::Reply(reply)) => {
                let decoded = Message::from_bytes(&reply.payload).unwrap();
                assert_eq!(decoded.xid(), message.xid());
                assert_eq!(decoded.chaddr(), message.chaddr());
                (reply, decoded)
            }
            other => panic!("no reply but {other:?}"),
        }
    }

    fn discover(&mut self, n: u16, options: Vec<DhcpOption>) -> Message {
        self.ask(&message(n, MessageType::Discover, options)).1
    }

    fn select(&mut self, n: u16, address: Ipv4Addr) -> Message {
        let options = vec![DhcpOption::ServerIdentifier(GATEWAY), DhcpOption::RequestedIpAddress(address)];
        self.ask(&message(n, MessageType::Request, options)).1
    }

    /// DISCOVER to ACK; the address.
    fn join(&mut self, n: u16) -> Ipv4Addr {
        let offered = self.discover(n, vec![]).yiaddr();
        let ack = self.select(n, offered);
        assert_eq!(kind(&ack), MessageType::Ack);
        assert_eq!(ack.yiaddr(), offered);
        offered
    }

    fn renew(&mut self, n: u16, address: Ipv4Addr) -> (Reply, Message) {
        let mut renew = message(n, MessageType::Request, vec![]);
        renew.set_ciaddr(address);
        self.ask(&renew)
    }
}

fn kind(message: &Message) -> MessageType {
    message.opts().msg_type().unwrap()
}

fn codes(reply: &Reply) -> Vec<u8> {
    let (mut codes, mut rest) = (Vec::new(), &reply.payload[240..]);
    while let [code, len, behind @ ..] = rest
        && *code != 255
    {
        codes.push(*code);
        rest = &behind[usize::from(*len)..];
    }
    codes
}

#[test]
fn discover_offer_request_ack_gives_a_lease_with_what_was_asked_for() {
    let mut dialogue = Dialogue::new();
    let wanted = [1, 28, 2, 3, 15, 6, 119, 12, 44, 47, 26, 121, 42];
    let list = DhcpOption::ParameterRequestList(wanted.map(OptionCode::from).to_vec());
    let offer = dialogue.discover(1, vec![list.clone()]);
    assert_eq!(kind(&offer), MessageType::Offer);
    let server = DhcpOption::ServerIdentifier(GATEWAY);
    let mut request = message(1, MessageType::Request, vec![server.clone(), list]);
    request.opts_mut().insert(DhcpOption::RequestedIpAddress(offer.yiaddr()));
    request.opts_mut().insert(DhcpOption::Hostname("VM1.example".into()));
    let (reply, ack) = dialogue.ask(&request);
    assert_eq!(kind(&ack), MessageType::Ack);
    assert_eq!(codes(&reply), [53, 54, 51, 58, 59, 1, 28, 3, 15, 6, 119, 26, 121]);
    let get = |code: OptionCode| ack.opts().get(code).unwrap().clone();
    assert_eq!(get(OptionCode::SubnetMask), DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)));
    assert_eq!(get(OptionCode::Router), DhcpOption::Router(vec![GATEWAY]));
    assert_eq!(get(OptionCode::DomainNameServer), DhcpOption::DomainNameServer(vec![GATEWAY]));
    assert_eq!(get(OptionCode::BroadcastAddr), DhcpOption::BroadcastAddr(addr(255)));
    assert_eq!(get(OptionCode::InterfaceMtu), DhcpOption::InterfaceMtu(1500));
    assert_eq!(get(OptionCode::DomainName), DhcpOption::DomainName("internal".into()));
    assert_eq!(get(OptionCode::AddressLeaseTime), DhcpOption::AddressLeaseTime(3600));
    assert_eq!(get(OptionCode::Renewal), DhcpOption::Renewal(1800));
    assert_eq!(get(OptionCode::Rebinding), DhcpOption::Rebinding(3150));
    assert_eq!(get(OptionCode::DomainSearch), DhcpOption::DomainSearch(vec!["internal.".parse().unwrap()]));
    let DhcpOption::ClasslessStaticRoute(routes) = get(OptionCode::ClasslessStaticRoute) else { panic!() };
    assert_eq!((routes[0].0.to_string(), routes[0].1), ("0.0.0.0/0".to_owned(), GATEWAY));
    assert_eq!(get(OptionCode::ServerIdentifier), server);
    let lease = dialogue.server.leases(dialogue.now).next().unwrap();
    assert_eq!((lease.address, lease.mac, lease.name), (offer.yiaddr(), mac(1), Some("vm1".to_owned())));
    assert_eq!(reply.bound, Some((offer.yiaddr(), dialogue.now + Duration::from_secs(3600))));
    assert!(reply.payload.len() >= 300);
}

#[test]
fn answers_go_where_the_client_can_hear_them() {
    let mut dialogue = Dialogue::new();
    let (reply, offer) = dialogue.ask(&message(1, MessageType::Discover, vec![]));
    assert_eq!((reply.mac, reply.to), (mac(1), offer.yiaddr()));
    let mut broadcast = message(1, MessageType::Discover, vec![]);
    broadcast.set_flags(Flags::default().set_broadcast());
    let (reply, offer) = dialogue.ask(&broadcast);
    assert_eq!((reply.mac, reply.to), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST));
    assert!(offer.flags().broadcast());
    let address = dialogue.join(1);
    let (reply, ack) = dialogue.renew(1, address);
    assert_eq!((reply.mac, reply.to, ack.ciaddr()), (mac(1), address, address));
}

#[test]
fn a_machine_keeps_its_address_over_a_restart_of_the_network() {
    let first = Dialogue::new().join(77);
    assert_eq!(Dialogue::new().join(77), first);
    let mut rebooted = Dialogue::new();
    let (_, ack) =
        rebooted.ask(&message(77, MessageType::Request, vec![DhcpOption::RequestedIpAddress(first)]));
    assert_eq!((kind(&ack), ack.yiaddr()), (MessageType::Ack, first));
}

#[test]
fn a_lease_that_ran_out_while_the_network_stood_still_is_renewed() {
    let mut dialogue = Dialogue::new();
    let (one, two) = (dialogue.join(1), dialogue.join(2));
    dialogue.wait(86_400);
    assert_eq!(dialogue.server.leases(dialogue.now).count(), 0);
    let (reply, ack) = dialogue.renew(1, one);
    assert_eq!((kind(&ack), ack.yiaddr()), (MessageType::Ack, one));
    assert_eq!(reply.bound, Some((one, dialogue.now + Duration::from_secs(3600))));
    // Who comes first does not take the other's address, however long that one sleeps on.
    assert_ne!(dialogue.join(3), two);
    assert_eq!(kind(&dialogue.renew(2, two).1), MessageType::Ack);
}

#[test]
fn a_wrong_address_is_refused_with_a_broadcast_nak() {
    let mut dialogue = Dialogue::new();
    let taken = dialogue.join(1);
    for wrong in [Ipv4Addr::new(10, 0, 0, 5), GATEWAY, addr(255), addr(0), taken] {
        let (reply, nak) =
            dialogue.ask(&message(2, MessageType::Request, vec![DhcpOption::RequestedIpAddress(wrong)]));
        assert_eq!(kind(&nak), MessageType::Nak, "{wrong}");
        assert_eq!((reply.mac, reply.to), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST));
        assert_eq!(nak.yiaddr(), Ipv4Addr::UNSPECIFIED);
        assert!(nak.opts().get(OptionCode::AddressLeaseTime).is_none());
    }
    let (_, nak) = dialogue.renew(2, taken);
    assert_eq!(kind(&nak), MessageType::Nak);
}

#[test]
fn an_offer_to_a_client_that_chose_another_server_is_withdrawn() {
    let mut dialogue = Dialogue::small(1);
    let offered = dialogue.discover(1, vec![]).yiaddr();
    assert_eq!(dialogue.tell(&message(2, MessageType::Discover, vec![])), Err(DropReason::TableFull));
    let other = vec![DhcpOption::ServerIdentifier(addr(9)), DhcpOption::RequestedIpAddress(addr(8))];
    assert_eq!(dialogue.tell(&message(1, MessageType::Request, other)), Ok(Outcome::Silence));
    assert_eq!(dialogue.join(2), offered);
}

#[test]
fn a_released_address_is_kept_for_its_machine_until_it_is_needed() {
    let mut dialogue = Dialogue::small(2);
    let (one, two) = (dialogue.join(1), dialogue.join(2));
    let mut release = message(1, MessageType::Release, vec![DhcpOption::ServerIdentifier(GATEWAY)]);
    release.set_ciaddr(two);
    assert_eq!(dialogue.tell(&release), Ok(Outcome::Silence), "not its own");
    release.set_ciaddr(one);
    assert_eq!(dialogue.tell(&release), Ok(Outcome::Freed(one)));
    assert_eq!(dialogue.server.leases(dialogue.now).count(), 1);
    assert_eq!(dialogue.join(1), one);
    dialogue.tell(&release).unwrap();
    assert_eq!(dialogue.join(3), one);
}

#[test]
fn a_declined_address_is_in_quarantine() {
    let mut dialogue = Dialogue::small(1);
    let address = dialogue.join(1);
    let decline = message(1, MessageType::Decline, vec![DhcpOption::RequestedIpAddress(address)]);
    assert_eq!(
        dialogue.tell(&message(2, MessageType::Decline, vec![DhcpOption::RequestedIpAddress(address)])),
        Ok(Outcome::Silence)
    );
    assert_eq!(dialogue.tell(&decline), Ok(Outcome::Freed(address)));
    assert_eq!(dialogue.tell(&message(1, MessageType::Discover, vec![])), Err(DropReason::TableFull));
    dialogue.wait(QUARANTINE.as_secs());
    assert_eq!(dialogue.join(2), address);
}

#[test]
fn inform_is_acknowledged_without_an_address_or_times() {
    let mut dialogue = Dialogue::new();
    let mut inform = message(1, MessageType::Inform, vec![]);
    inform.set_ciaddr(addr(50));
    let (reply, ack) = dialogue.ask(&inform);
    assert_eq!(kind(&ack), MessageType::Ack);
    assert_eq!((reply.mac, reply.to), (mac(1), addr(50)));
    assert_eq!((ack.yiaddr(), ack.ciaddr()), (Ipv4Addr::UNSPECIFIED, addr(50)));
    for absent in [OptionCode::AddressLeaseTime, OptionCode::Renewal, OptionCode::Rebinding] {
        assert!(ack.opts().get(absent).is_none());
    }
    assert!(ack.opts().get(OptionCode::Router).is_some());
    assert_eq!(dialogue.server.leases(dialogue.now).count(), 0);
}

#[test]
fn reservations_are_for_their_machine_only() {
    let reservation = Reservation { mac: mac(9), addr: addr(33), name: Some("db".to_owned()) };
    let mut dialogue = Dialogue::with(NatConfig { reservations: vec![reservation], ..NatConfig::default() });
    let stranger = dialogue.discover(1, vec![DhcpOption::RequestedIpAddress(addr(33))]);
    assert_ne!(stranger.yiaddr(), addr(33));
    assert_eq!(dialogue.join(9), addr(33));
    let ack = dialogue.select(9, addr(33));
    assert_eq!(ack.opts().get(OptionCode::Hostname), Some(&DhcpOption::Hostname("db".into())));
    assert_eq!(dialogue.server.leases(dialogue.now).next().unwrap().name.as_deref(), Some("db"));
    assert_eq!(kind(&dialogue.renew(9, addr(40)).1), MessageType::Ack, "a free address is not forbidden");
}

#[test]
fn a_flood_of_discovers_holds_the_pool_for_seconds_only() {
    let mut dialogue = Dialogue::new();
    let resident = dialogue.join(1);
    let mut full = 0;
    for n in 1000..3000 {
        match dialogue.tell(&message(n, MessageType::Discover, vec![])) {
            Ok(_) => {}
            Err(reason) => {
                assert_eq!(reason, DropReason::TableFull);
                full += 1;
            }
        }
    }
    assert_eq!((full, dialogue.server.pool.len()), (2000 - 252, 253));
    assert_eq!(kind(&dialogue.renew(1, resident).1), MessageType::Ack);
    dialogue.wait(OFFER_HOLD.as_secs());
    dialogue.join(2);
}

#[test]
fn identifiers_are_echoed_and_tell_clients_of_one_machine_apart() {
    let mut dialogue = Dialogue::new();
    let id = |n: u8| DhcpOption::ClientIdentifier(vec![255, 0, 0, 0, n]);
    let (first, other) = (dialogue.discover(1, vec![id(1)]), dialogue.discover(1, vec![id(2)]));
    assert_ne!(first.yiaddr(), other.yiaddr());
    assert_eq!(first.opts().get(OptionCode::ClientIdentifier), Some(&id(1)));
    // Two clones with one identifier are two machines.
    assert_ne!(dialogue.discover(2, vec![id(1)]).yiaddr(), first.yiaddr());
    // The initramfs sends none, or the Ethernet address, the system its own: one machine.
    let plain = dialogue.join(3);
    let hardware = DhcpOption::ClientIdentifier([&[1], &mac(3).octets()[..]].concat());
    assert_eq!(dialogue.discover(3, vec![hardware]).yiaddr(), plain);
    assert_eq!(dialogue.discover(3, vec![id(7)]).yiaddr(), plain);
}

#[test]
fn one_machine_with_many_identifiers_does_not_empty_the_pool() {
    let mut dialogue = Dialogue::new();
    let id = |n: u8| DhcpOption::ClientIdentifier(vec![0, n]);
    let offers = (0..100).filter(|n| dialogue.tell(&message(1, MessageType::Discover, vec![id(*n)])).is_ok());
    assert_eq!(offers.count(), MAX_PER_MAC);
}

#[test]
fn an_unplugged_machine_comes_back_to_its_address_with_a_new_identifier() {
    let mut dialogue = Dialogue::new();
    let id = |n: u8| vec![DhcpOption::ClientIdentifier(vec![0, n])];
    let before = dialogue.discover(1, id(1)).yiaddr();
    dialogue.server.unplug(mac(1), dialogue.now);
    assert_eq!(dialogue.discover(1, id(1)).yiaddr(), before);
}

#[test]
fn a_short_lease_is_granted_and_an_endless_one_is_not() {
    let mut dialogue = Dialogue::new();
    for (asked, given) in [(600, 600), (1, 60), (u32::MAX, 3600)] {
        let offer = dialogue.discover(1, vec![DhcpOption::AddressLeaseTime(asked)]);
        assert_eq!(
            offer.opts().get(OptionCode::AddressLeaseTime),
            Some(&DhcpOption::AddressLeaseTime(given))
        );
    }
    let address = dialogue.join(1);
    dialogue.wait(3600);
    assert_eq!(dialogue.server.leases(dialogue.now).count(), 0);
    assert_eq!(dialogue.join(1), address);
}

#[test]
fn options_that_do_not_fit_576_bytes_move_to_file_and_sname() {
    let mut dialogue = Dialogue::new();
    let domains = |n: usize| (0..n).map(|i| format!("a-rather-long-domain-name-{i}.example")).collect();
    dialogue.server.set_search(domains(3));
    let list =
        || DhcpOption::ParameterRequestList([1, 3, 6, 119, 15, 26, 28, 121].map(OptionCode::from).to_vec());
    let id = DhcpOption::ClientIdentifier(vec![7; 118]);
    let (reply, offer) = dialogue.ask(&message(1, MessageType::Discover, vec![list(), id.clone()]));
    assert!(reply.payload.len() <= 576 - 28);
    assert_eq!(offer.opts().get(OptionCode::OptionOverload), Some(&DhcpOption::OptionOverload(1)));
    assert_eq!(codes(&reply), [53, 54, 61, 51, 58, 59, 1, 3, 6, 119, 15, 26, 52]);
    assert_eq!(reply.payload[108..122], [28, 4, 192, 168, 122, 255, 121, 5, 0, 192, 168, 122, 1, 255]);
    // Our own parser follows option 52, too.
    let mut request = message(1, MessageType::Request, vec![DhcpOption::OptionOverload(3)]).to_vec().unwrap();
    request[108..115].copy_from_slice(&[50, 4, 192, 168, 122, 9, 255]);
    request[44..51].copy_from_slice(&[57, 2, 5, 220, 255, 0, 0]);
    let parsed = Request::parse(&request).unwrap();
    assert_eq!((parsed.requested, parsed.max_size), (Some(addr(9)), Some(1500)));
    // A client that takes more gets all of it in the options field.
    let big = message(1, MessageType::Discover, vec![list(), id, DhcpOption::MaxMessageSize(1500)]);
    let (reply, offer) = dialogue.ask(&big);
    assert!(offer.opts().get(OptionCode::OptionOverload).is_none());
    assert!(codes(&reply).contains(&119));
    // What fits nowhere is left out, and the rest still stands.
    dialogue.server.set_search(domains(60));
    let (reply, _) = dialogue.ask(&message(1, MessageType::Discover, vec![list()]));
    assert_eq!(codes(&reply), [53, 54, 51, 58, 59, 1, 3, 6, 15, 26, 28, 121]);
}

#[test]
fn what_is_not_for_this_server_is_counted_by_its_reason() {
    let mut dialogue = Dialogue::new();
    let mut relayed = message(1, MessageType::Discover, vec![]);
    relayed.set_giaddr(addr(7));
    assert_eq!(dialogue.tell(&relayed), Err(DropReason::Policy));
    assert_eq!(dialogue.tell(&message(1, MessageType::Offer, vec![])), Err(DropReason::UnknownProtocol));
    let bytes = message(1, MessageType::Discover, vec![]).to_vec().unwrap();
    assert_eq!(dialogue.server.input(&bytes, mac(2), dialogue.now), Err(DropReason::BadSource));
    assert_eq!(dialogue.server.input(&bytes[..239], mac(1), dialogue.now), Err(DropReason::Malformed));
    assert_eq!(dialogue.server.input(&bytes[..240], mac(1), dialogue.now), Err(DropReason::UnknownProtocol));
    assert_eq!(dialogue.tell(&message(1, MessageType::Request, vec![])), Err(DropReason::Malformed));
    assert_eq!(dialogue.tell(&message(1, MessageType::Inform, vec![])), Err(DropReason::Malformed));
}

#[test]
fn host_names_become_labels_or_nothing() {
    let label = |name: &str| sanitise(name.as_bytes());
    assert_eq!(label("VM1.lan"), Some("vm1".to_owned()));
    assert_eq!(label("a-b\0"), Some("a-b".to_owned()));
    for bad in ["", "-a", "a-", "a_b", "ä", ".x", "localhost", "a b", &"a".repeat(64)] {
        assert_eq!(label(bad), None, "{bad}");
    }
}

#[test]
fn a_name_is_given_to_one_machine_only() {
    let mut dialogue = Dialogue::new();
    for n in [1, 2] {
        let offered = dialogue.discover(n, vec![]).yiaddr();
        let options = vec![DhcpOption::RequestedIpAddress(offered), DhcpOption::Hostname("web".into())];
        dialogue.ask(&message(n, MessageType::Request, options));
    }
    let names: Vec<_> = dialogue.server.leases(dialogue.now).filter_map(|l| l.name).collect();
    assert_eq!(names, ["web"]);
}

#[derive(Clone, Debug)]
enum Step {
    Discover(u16, Option<u8>),
    Take(u16),
    Request(u16, u8),
    Renew(u16),
    Release(u16),
    Decline(u16),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0u16..12;
    prop_oneof![
        (n.clone(), proptest::option::of(0u8..12)).prop_map(|(n, wanted)| Step::Discover(n, wanted)),
        n.clone().prop_map(Step::Take),
        (n.clone(), 0u8..12).prop_map(|(n, a)| Step::Request(n, a)),
        n.clone().prop_map(Step::Renew),
        n.clone().prop_map(Step::Release),
        n.prop_map(Step::Decline),
        (0u64..2000).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn two_clients_never_share_a_lease(steps in proptest::collection::vec(step(), 1..200)) {
        let mut dialogue = Dialogue::small(6);
        // What each client believes: its address and until when.
        let mut offers: BTreeMap<u16, Ipv4Addr> = BTreeMap::new();
        let mut held: BTreeMap<u16, (Ipv4Addr, Instant)> = BTreeMap::new();
        for step in steps {
            let asked = match step {
                Step::Wait(secs) => { dialogue.wait(secs); continue }
                Step::Discover(n, wanted) => {
                    let wanted = wanted.map(|a| DhcpOption::RequestedIpAddress(addr(a)));
                    if let Ok(Outcome::Reply(reply)) = dialogue.tell(&message(n, MessageType::Discover, wanted.into_iter().collect())) {
                        offers.insert(n, Message::from_bytes(&reply.payload).unwrap().yiaddr());
                    }
                    continue;
                }
                Step::Take(n) => offers.get(&n).map(|a| (n, *a)),
                Step::Request(n, a) => Some((n, addr(a))),
                Step::Renew(n) => held.get(&n).map(|(a, _)| (n, *a)),
                Step::Release(n) => {
                    if let Some((address, _)) = held.remove(&n) {
                        let mut release = message(n, MessageType::Release, vec![]);
                        release.set_ciaddr(address);
                        let _ = dialogue.tell(&release);
                    }
                    continue;
                }
                Step::Decline(n) => {
                    if let Some((address, _)) = held.remove(&n) {
                        let option = DhcpOption::RequestedIpAddress(address);
                        let _ = dialogue.tell(&message(n, MessageType::Decline, vec![option]));
                    }
                    continue;
                }
            };
            let Some((n, address)) = asked else { continue };
            let request = message(n, MessageType::Request, vec![DhcpOption::RequestedIpAddress(address)]);
            let Ok(Outcome::Reply(reply)) = dialogue.tell(&request) else { panic!("a request is answered") };
            match reply.bound {
                Some((given, until)) => {
                    prop_assert_eq!(given, address);
                    held.insert(n, (given, until));
                }
                None => { held.remove(&n); }
            }
            let now = dialogue.now;
            held.retain(|_, (_, until)| *until > now);
            for (client, (address, _)) in &held {
                prop_assert!((addr(2)..=addr(7)).contains(address));
                prop_assert!(held.iter().all(|(c, (a, _))| c == client || a != address), "{:?}", held);
            }
            prop_assert!(dialogue.server.pool.len() <= 6);
        }
    }

    #[test]
    fn any_bytes_are_refused_or_answered(
        head in proptest::collection::vec(any::<u8>(), 236),
        options in proptest::collection::vec(any::<u8>(), 0..400),
        kind in 0u8..10,
    ) {
        let mut dialogue = Dialogue::new();
        let mut bytes = [head, vec![99, 130, 83, 99, 53, 1, kind], options].concat();
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[24..28].fill(0);
        let source = MacAddr(bytes[28..34].try_into().unwrap());
        if let Ok(Outcome::Reply(reply)) = dialogue.server.input(&bytes, source, dialogue.now) {
            prop_assert!(Message::from_bytes(&reply.payload).is_ok());
            prop_assert!(reply.payload.len() <= 1500 - 28);
        }
        let _ = dialogue.server.input(&bytes[..bytes.len() / 2], source, dialogue.now);
        prop_assert!(dialogue.server.pool.len() <= 253);
    }
}
